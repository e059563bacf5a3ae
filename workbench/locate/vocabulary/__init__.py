"""Vocabulary projection: what does a vector inside the model say, in words? (Survey section on vocabulary projection.)

Training-free but for the tuned lens. A projection reads a vector as if the model ended there: what later layers make of it
is not in it (`patchscope` lets them speak), and a word that shows need not be used.
"""

from workbench.locate.vocabulary.attribution import logit_attribution
from workbench.locate.vocabulary.backward import BackwardLens, backward_lens
from workbench.locate.vocabulary.circuits import HeadVocabulary, copying_scores, ov_circuit, qk_circuit
from workbench.locate.vocabulary.lens import Lens, logit_lens
from workbench.locate.vocabulary.neurons import NeuronVocabulary, neuron_vocabulary
from workbench.locate.vocabulary.patchscope import Patchscope, patchscope
from workbench.locate.vocabulary.tuned import TunedLens, tuned_lens

__all__ = [
    "BackwardLens", "HeadVocabulary", "Lens", "NeuronVocabulary", "Patchscope", "TunedLens", "backward_lens",
    "copying_scores", "logit_attribution", "logit_lens", "neuron_vocabulary", "ov_circuit", "patchscope", "qk_circuit",
    "tuned_lens",
]  # fmt: skip
