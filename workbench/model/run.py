"""A model to look into: logits, activations and generation, with interventions, on padded batches."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import warnings
from functools import cached_property

import nnsight
import torch

from workbench.component import SINGLE, Component, components
from workbench.model.bake import bake
from workbench.model.code import to_code
from workbench.model.cvector import to_gguf
from workbench.model.edit import LOCK, edited, refuse_delta, with_weights
from workbench.model.features import attach, detach
from workbench.model.names import Names, find_names
from workbench.model.peft import from_peft, to_peft
from workbench.model.plan import TOKENS_PER_PASS, Edits, Prompts, check_recipe
from workbench.model.weights import weight

nnsight.register("workbench")  # so that traces can leave the machine (remote=)


class Model:
    """A Hugging Face decoder under the workbench's names.

    Attributes:
        hf, nnsight, tokenizer: the transformers model, the nnsight model over it, the tokenizer.
        names: sizes (`names.n_layers`, ...) and what is offered.
        bos: whether prompts start with the beginning-of-sequence token.
        remote: passed to every nnsight trace: None, "local" (a dry run of leaving the machine) or True (NDIF).
        made_from: inside `edited`, the fingerprints of the model before; recipes made for it still fit.
        revision: the checkpoint that was loaded, as given to `load`.
    """

    made_from: tuple[str, ...] = ()
    revision: str | None = None

    def __init__(self, hf, tokenizer, bos: bool | None = None):
        self.hf, self.tokenizer, self.remote = hf, tokenizer, None
        for parameter in hf.parameters():
            parameter.requires_grad_(False)
        self.nnsight = nnsight.TransformersModel(hf, tokenizer=tokenizer, task="text-generation")
        accepted = inspect.signature(type(hf).forward).parameters
        self.cache_key = "cache" if "cache" in accepted else "past_key_values"
        self._takes_positions = "position_ids" in accepted
        adds = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
        if bos and tokenizer.bos_token_id is None:
            raise ValueError("bos=True, but this tokenizer has no beginning-of-sequence token.")
        self.bos = adds if bos is None else bos
        probe = torch.arange(6).remainder(hf.config.vocab_size)[None].repeat(2, 1)
        probe[1] = probe[1].flip(0)
        self.names: Names = find_names(
            self.nnsight, hf.config, lambda read, names: self.trace(self.inputs(probe), lambda: read(names, len(probe)))
        )

    def __repr__(self) -> str:
        n = self.names
        size = sum(p.numel() for p in self.hf.parameters()) / 1e6
        return (f"Model({self.hf.config.model_type}, {size:.2f}M parameters, {n.n_layers} layers, {n.n_heads} heads, "
                f"d_model {n.d_model}, vocabulary {n.d_vocab}, bos={self.bos})")  # fmt: skip

    # text and tokens

    def ids(self, text: str) -> torch.Tensor:
        """The token ids of a text, [position].

        Raises:
            ValueError: for an empty text or a word the tokenizer does not know, with the nearest words.
        """
        if not isinstance(text, str):
            raise TypeError(f"A prompt is a string; got {type(text).__name__}.")
        if not text.strip():
            raise ValueError("The prompt is empty, so there is no position to look at. Give it at least one word.")
        ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in ids:
            raise ValueError(self._unknown_words(text))
        if self.bos:
            ids = [self.tokenizer.bos_token_id, *ids]
        return torch.tensor(ids)

    def _unknown_words(self, text: str) -> str:
        unknown, vocabulary = self.tokenizer.unk_token_id, list(self.tokenizer.get_vocab())
        said = []
        for word in dict.fromkeys(text.split()):
            if unknown in self.tokenizer(word, add_special_tokens=False).input_ids:
                near = difflib.get_close_matches(word.lower(), vocabulary, 3, 0.5)
                said.append(f"{word!r}" + (f" (nearest: {', '.join(near)})" if near else ""))
        return f"Not in this model's vocabulary: {'; '.join(said)}. model.tokens(text) shows how a text is cut."

    def tokens(self, text: str) -> list[str]:
        """How is this text cut into tokens? Leading spaces are shown as they are."""
        return [self.token(i) for i in self.ids(text)]

    def token(self, token_id: int) -> str:
        """One token as text."""
        return str(self.tokenizer.convert_ids_to_tokens(int(token_id))).replace("Ġ", " ").replace("▁", " ")

    def chat(self, user: str, system: str | None = None) -> str:
        """The prompt that asks `user` in the model's own chat template, ready for the assistant's turn.

        Raises:
            ValueError: when the tokenizer has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise ValueError("This tokenizer has no chat template; write the prompt as plain text.")
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": user})
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        bos = self.tokenizer.bos_token
        return text.removeprefix(bos).lstrip(" ") if self.bos and bos else text

    def weight(self, name: str, layer: int | None = None, index: int | None = None) -> torch.Tensor:
        """A weight matrix under its field name: `model.weight("W_O", 4, 2)`. See `workbench.model.weights`."""
        return weight(self, name, layer, index)

    def attach(self, sae, name: str | None = None):
        """Make the features of a sparse autoencoder addressable: from now on `feature.NAME.77` can be read and changed.

        A change of a feature moves the stream by (f' - f) W_dec and leaves what the SAE does not explain where it is, so
        attaching alone changes nothing, and changing no feature is exact. Several SAEs may be attached at once.

        Args:
            sae: an `SAE`; name: the NAME of its features, by default `sae.name`.
        Returns:
            The SAE as it is attached.
        Raises:
            ValueError: for a name in use, an SAE of another model, or one that fits no tensor here.
        """
        return attach(self, sae, name)

    def detach(self, name: str | None = None) -> None:
        """Take an SAE off again; all of them without a name."""
        detach(self, name)

    # interventions in the weights, as a checkpoint, a script, a control vector, an adapter: see the modules of these names
    edited, bake, to_code, to_gguf, to_peft, from_peft = edited, bake, to_code, to_gguf, to_peft, from_peft

    @property
    def saes(self) -> dict:
        """Name -> the SAEs that are attached."""
        return dict(self.names.saes)

    # running

    def inputs(self, ids, mask=None, start: int = 0) -> dict:
        """Model inputs for a [row, column] tensor of ids or a `Prompts`; `start` leaves out that many first columns."""
        if isinstance(ids, Prompts):
            pad = self.tokenizer.pad_token_id
            pad = pad if pad is not None else (self.tokenizer.eos_token_id or 0)
            block = torch.full((len(ids.ids), ids.width), pad)
            mask = torch.zeros_like(block)
            for row, one in enumerate(ids.ids):
                block[row, ids.pads[row] :], mask[row, ids.pads[row] :] = one, 1
            ids = block
        mask = torch.ones_like(ids) if mask is None else mask
        device = self.hf.device
        batch = {"input_ids": ids[:, start:].to(device), "attention_mask": mask.to(device)}
        if self._takes_positions:
            batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:].to(device)
        return batch

    def trace(self, batch: dict, body, **kwargs):
        """Run one forward pass without gradients and return what `body()`, called inside the nnsight trace, returns."""
        if self.remote is not None:
            kwargs["remote"] = self.remote
        nn = self.nnsight
        with LOCK, torch.no_grad(), nn.trace(batch, **kwargs):
            found = nnsight.save(body())
        return found

    def _prompts(self, prompts, spans=None) -> Prompts:
        if isinstance(prompts, Prompts):
            return prompts
        if not hasattr(prompts, "__iter__"):
            raise TypeError(f"Prompts are a text or a list of texts; got {type(prompts).__name__}.")
        single = isinstance(prompts, str) or (isinstance(prompts, torch.Tensor) and prompts.dim() == 1)
        prompts = [prompts] if single else list(prompts)
        if not prompts:
            raise ValueError("No prompt was given.")
        return Prompts([self.ids(p) if isinstance(p, str) else p for p in prompts], spans=spans)

    def _edits(self, interventions, prompts: Prompts, read=()) -> Edits:
        check_recipe(self, interventions)
        refuse_delta(interventions)
        return Edits(self.names, interventions, prompts, read)

    @with_weights
    def logits(self, prompts, *interventions, positions: str = "last", spans=None):
        """What does the model predict next, with these interventions?

        Args:
            prompts: a text, a list of texts or of id tensors.
            positions: "last" or "all".
        Returns:
            [prompt, d_vocab] at the last position; for "all" a list with one [position, d_vocab] per prompt.
        """
        if positions not in ("last", "all"):
            raise ValueError(f"positions={positions!r} is unknown; choose 'last' or 'all'.")
        found, prompts = [], self._prompts(prompts, spans)
        self._edits(interventions, prompts)  # refuses what cannot be done before anything runs
        keep = {"logits_to_keep": 1} if positions == "last" else {}
        for part in prompts.chunks(TOKENS_PER_PASS if keep else min(TOKENS_PER_PASS, 2**28 // self.names.d_vocab)):
            run = self._edits(interventions, part)
            block = self.trace(self.inputs(part), run.visit_logits, **keep).cpu().float()
            found.append(
                block[:, -1] if positions == "last" else [b[p:] for b, p in zip(block, part.pads, strict=True)]
            )
        return torch.cat(found) if positions == "last" else [one for block in found for one in block]

    @with_weights
    def activations(self, prompts, at, *interventions, spans=None):
        """What are the activations here?

        Args:
            at: a component, its printed form, or a list. Without a position all prompts must have equal length.
        Returns:
            For one component a tensor: [prompt, position, width], or [prompt, width] with a position (a span of several
            tokens is averaged). Neurons, experts (their routing weights) and features have no width axis. For a list, a
            dict from component to such a tensor.
        """
        wanted = self.names.expand(components(at))
        prompts = self._prompts(prompts, spans)
        if len(set(map(len, prompts.ids))) > 1 and any(one.position is None for one in wanted):
            raise ValueError("These prompts differ in length, so their positions do not line up. Name a position, for "
                             "example '@-1', or give prompts of equal length.")  # fmt: skip
        parts: dict[Component, list] = {one: [] for one in wanted}
        for part in prompts.chunks():
            run = self._edits(interventions, part, wanted)
            seen = self.trace(self.inputs(part), run.visit)
            for one in wanted:
                parts[one].append(_placed(seen[one], part, one))
        found = {one: torch.cat(blocks) for one, blocks in parts.items()}
        single = isinstance(at, (str, Component)) and len(wanted) == 1
        return found[wanted[0]] if single else found

    @with_weights
    def gradients(self, prompts, at, metric, *interventions, spans=None):
        """How does a metric of the next token change with the activations here?

        Args:
            at: components as for `activations`.
            metric: (logits [row, d_vocab] at the last position, prompt numbers [row]) -> [row].
        Returns:
            (metric [prompt], activations, gradients), the last two as dicts from component to a tensor such as
            `activations` gives; with a span of several tokens, means over it.
        """
        wanted = self.names.expand(components(at))
        prompts = self._prompts(prompts, spans)
        if len(set(map(len, prompts.ids))) > 1 and any(one.position is None for one in wanted):
            raise ValueError("These prompts differ in length, so their positions do not line up. Name a position, for "
                             "example '@-1', or give prompts of equal length.")  # fmt: skip
        values, acts, slopes, done = [], {one: [] for one in wanted}, {one: [] for one in wanted}, 0
        for part in prompts.chunks():
            run, rows = self._edits(interventions, part, wanted), torch.arange(done, done + len(part.ids))
            value, seen, grads = self.trace(self.inputs(part), _with_gradients(run, metric, rows))
            values.append(value.float().cpu())
            for one in wanted:
                acts[one].append(_placed(seen[one], part, one))
                slopes[one].append(_placed(grads[one], part, one))
            done += len(part.ids)
        return torch.cat(values), *({one: torch.cat(x) for one, x in parts.items()} for parts in (acts, slopes))

    def generate(self, prompts, *interventions, max_new_tokens: int = 20, seed: int = 0, **kwargs):
        """What does the model say, with these interventions?

        Greedy unless `do_sample=True`; further arguments go to transformers' `generate`.

        Returns:
            The continuation, for one text; a list of them for several.
        """
        made = self.generate_ids(prompts, *interventions, max_new_tokens=max_new_tokens, seed=seed, **kwargs)
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in made]
        return texts[0] if isinstance(prompts, str) else texts

    @with_weights
    def generate_ids(self, prompts, *interventions, max_new_tokens=20, seed=0, spans=None, **kwargs):
        """Like `generate`, as one 1-D tensor of new token ids per prompt (end-of-sequence and padding left off)."""
        prompts = self._prompts(prompts, spans)
        if kwargs.get("num_beams", 1) != 1 or kwargs.get("num_return_sequences", 1) != 1:
            raise ValueError("Generation with interventions gives one text per prompt: leave out num_beams and "
                             "num_return_sequences, or repeat the prompt and sample.")  # fmt: skip
        run = self._edits(interventions, prompts)
        eos = kwargs.get("eos_token_id", self.hf.generation_config.eos_token_id)
        stop = set(eos if isinstance(eos, list) else [eos]) | {self.tokenizer.eos_token_id}
        batch = self.inputs(prompts)
        batch.pop("position_ids", None)
        settings = {"max_new_tokens": max_new_tokens, "pad_token_id": self.tokenizer.pad_token_id, "do_sample": False}
        settings |= kwargs if self.remote is None else kwargs | {"remote": self.remote}
        nn = self.nnsight
        with LOCK, torch.no_grad(), torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*never reached.*")  # generation ended before max_new_tokens
            torch.manual_seed(seed)
            with nn.generate(**settings) as tracer:
                with tracer.invoke(batch):
                    for step in tracer.iter[:max_new_tokens]:
                        run.visit(step)
                with tracer.invoke():
                    whole = nnsight.save(tracer.result)
        found = []
        for row in whole[:, prompts.width :].cpu():
            ends = [i for i, token in enumerate(row.tolist()) if token in stop]
            found.append(row[: ends[0]] if ends else row)
        return found

    @cached_property
    def fingerprint(self) -> str:
        """Which model is this? A short hash of its configuration, vocabulary and samples of its tensors."""
        config = {k: v for k, v in self.hf.config.to_dict().items() if not k.startswith("_") and k not in
                  ("transformers_version", "torch_dtype", "dtype", "architectures")}  # fmt: skip
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        digest.update(json.dumps(self.tokenizer.get_vocab(), sort_keys=True).encode())
        for name, tensor in self.hf.state_dict().items():
            sample = tensor.flatten()[:: max(1, tensor.numel() // 64)].to(torch.bfloat16).float().cpu()
            digest.update(name.encode() + sample.numpy().tobytes())
        return digest.hexdigest()[:16]


def _placed(x: torch.Tensor, part: Prompts, one: Component) -> torch.Tensor:
    """What was read of one component, at its position (a span of several tokens averaged)."""
    x = x.float().cpu()
    if one.position is not None:
        x = torch.stack([x[row, part.columns(one, row)].mean(0) for row in range(len(x))])
    return x.squeeze(-1) if one.kind in SINGLE else x


def _with_gradients(run: Edits, metric, rows: torch.Tensor):
    return lambda: run.visit_gradients(lambda logits: metric(logits, rows))
