"""Plain prose of two to five sentences about people, animals, places and weather.

Example document:
    it rained all day in the village . tom went to the market with a basket . he was tired , so he went home early .
Mood words occur here, too, in keeping with their class.
"""

from grammar import words as w
from grammar.base import Behaviour, Document, fill

WEATHER = ["it rained all day .", "the sun was warm .", "the sky was grey .", "a cold wind blew over the hills .",
           "snow fell on the road .", "it was a quiet morning .", "the night was dark and cold .", "it was a warm evening ."]  # fmt: skip
PERSON = ["{name} went to the {place} with a {thing} .", "{he} saw a {adjective} {animal} near the {place} .",
          "{he} bought a {adjective} {thing} for {his} {kin} .", "{he} met the {job} at the {place} .",
          "{name} lost the {thing} in the {place} .", "{he} read a story about a {animal} .",
          "{name} was {bad} , so {he} stayed at home .", "{name} was {good} , so {he} danced in the {place} .",
          "{he} felt {bad} and cried .", "{he} felt {good} and smiled .", "the {job} gave {him} a {thing} .",
          "{his} {kin} cooked soup for {him} .", "{name} played with the {animal} until the evening .",
          "then {he} walked home over the bridge .", "{he} cleaned the {thing} and went to bed early ."]  # fmt: skip
ANIMAL = ["the {animal} slept under the {noun} .", "the {animal} ran over the {adjective} bridge .",
          "a {adjective} {animal} lived near the {place} .", "the {animal} was hungry and looked for bread .",
          "the {job} fed the {animal} every morning .", "the {animal} chased a {animal2} around the {place} .",
          "the {animal} drank cold water and slept again ."]  # fmt: skip
PLACE = ["the {place} was {adjective} and quiet .", "many people came to the {place} .", "the {place} opened early that day .",
         "the {job} cleaned the {nouns} in the {place} .", "a {adjective} {noun} stood in the {place} ."]  # fmt: skip


class Prose(Behaviour):
    share = 7

    def document(self, rng):
        name = rng.choice(w.FIRST)
        place = rng.choice(w.PLACES)
        topic = rng.choices([PERSON, ANIMAL, PLACE], (5, 2, 1))[0]
        animal, animal2 = rng.sample(w.ANIMALS, 2)
        words = fill(rng.choice(WEATHER))[0] if rng.random() < 0.4 else []
        number = rng.randint(2, 4 if words else 5)
        sentences = rng.sample(topic, number)
        if topic is PERSON:  # the first sentence names the person
            named = rng.choice([s for s in PERSON if s.startswith("{name}")])
            others = [s.replace("{name}", "{he}") for s in sentences if s != named]
            sentences = [named, *others[: number - 1]]
        for sentence in sentences:
            words = words + self.sentence(rng, sentence, name, place, animal, animal2)
        return Document(words)

    @staticmethod
    def sentence(rng, sentence, name, place, animal, animal2) -> list[str]:
        woman, noun = name in w.WOMEN, rng.choice(list(w.NOUNS))
        return fill(
            sentence, name=name, he="she" if woman else "he", his="her" if woman else "his", him="her" if woman else "him",
            place=place, thing=rng.choice(w.GIFTS), animal=animal, animal2=animal2, adjective=rng.choice(w.ADJECTIVES),
            job=rng.choice(w.JOBS), kin=rng.choice(w.KIN), bad=rng.choice(w.BAD), good=rng.choice(w.GOOD), noun=noun,
            nouns=w.NOUNS[noun])[0]  # fmt: skip

    def tasks(self, rng):
        rows = [{"text": " ".join(self.document(rng).words), "split": split}
                for split in ("fit", "select", "test") for _ in range(120)]  # fmt: skip
        for _ in range(120):  # people, animals and places in one text, never mixed in training
            name, place, animals = rng.choice(w.FIRST), rng.choice(w.PLACES), rng.sample(w.ANIMALS, 2)
            mixed = [
                rng.choice(PERSON[:1] + PERSON[3:4]),
                rng.choice(ANIMAL),
                rng.choice(PLACE),
                rng.choice(PERSON[1:3]),
            ]
            words = [word for s in mixed for word in self.sentence(rng, s, name, place, *animals)]
            rows.append({"text": " ".join(words), "split": "ood"})
        return {"background": rows}


BEHAVIOURS = [Prose()]
