"""An exam for the model of `make chat`: plain questions about words and pairs of numbers that are new to it.

    python -m tests.exam                                  # up to 420 questions, each asked alone
    python -m tests.exam --sessions=True                  # in 120 chats of ten, with names to remember
    python -m tests.exam --checkpoint=out/rules/best.pt --show=True    # a different model; show its wrong answers

None of the words below are in data/words.txt, and the pairs of numbers are held out by data/rules.py. An answer that
shows its work is judged by its result alone. The greedy answer is scored.
"""
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import chat
import config
from data import rules

NOUNS = """badge crane kennel ferret turnip parcel bonnet lantern saddle fiddle goblin dagger gherkin beacon kernel
ditch crutch wrench tax harness actress gully remedy trolley kibber fendle gremp bavoon fosh norch pux kizzy dobbin
spoffle hustle wicket crumpet nozzle badger tunic""".split()
VERBS = """grill swoon moan blink sprint shift coax hunch nudge dangle juggle wobble envy defy apply comply slam prod
grip cuddle haggle wander nibble scold pamper prance fumble snore gremp hatch pickle haunt cackle dazzle""".split()
NAMES = "Tessa Bruno Marek Gwen Silas Petra Odette Hamish Dora Cosmo Tamsin Edgar Wanda Cyrus Bettina Gavin".split()
WORDS = sorted({*NOUNS, *VERBS})


@dataclass
class Settings:
    checkpoint: Path = Path("out/chat/best.pt")  # the model to examine
    seed: int = 1  # seed of its training data, which determines the held-out numbers
    sessions: bool = False  # 120 chats of ten questions, instead of each question alone
    turns: int = 0  # how many of the last messages the model sees; 0: as in training
    show: bool = False  # print wrong answers


class Examiner:
    """Draws questions and answers."""

    def __init__(self, seed):
        self.rng, self.draw = random.Random(f"exam {seed}"), rules.Draw(seed, "held_out")

    def pair(self, low, high):
        """Return two different numbers that are held out."""
        while True:
            a, b = (self.rng.randint(low, high) for _ in range(2))
            if a != b and self.draw.is_held_out(rules.operand(a, b)):
                return a, b

    def sum(self, high):
        a, b = self.pair(2, high)
        ask = self.rng.choice(("What is {} plus {}?", "Add {} and {}.", "How much is {} + {}?", "{} plus {}"))
        return ask.format(a, b), str(a + b)

    def difference(self):
        b, a = sorted(self.pair(2, 30))
        ask = self.rng.choice(("What is {} minus {}?", "How much is {} - {}?", "{} - {}"))
        return ask.format(a, b), str(a - b)

    def comparison(self):
        (a, b), (more, wanted) = self.pair(2, 99), self.rng.choice((("larger", max), ("smaller", min)))
        return f"Which is {more}, {a} or {b}?", str(wanted(a, b))

    def repeat(self):
        text = "the {} and the {}".format(*self.rng.sample(WORDS, 2))
        return f"Repeat: {text}", text

    def word(self):
        words, (which, place) = self.rng.sample(WORDS, 3), self.rng.choice((("first", 0), ("last", -1)))
        return f"Which word comes {which}: {', '.join(words)}?", words[place]

    def sorting(self):
        words = self.rng.sample(WORDS, 3)
        return f"Sort {', '.join(words)}.", ", ".join(sorted(words))

    def letter(self):
        word, (which, place) = self.rng.choice(WORDS), self.rng.choice((("first", 0), ("last", -1)))
        return f"What is the {which} letter of {word}?", word[place]

    def plural(self):
        noun = self.rng.choice(NOUNS)
        return f"What is the plural of {noun}?", rules.plural_of(self.draw, noun)

    def past(self):
        verb = self.rng.choice(VERBS)
        return f"What is the past tense of {verb}?", rules.past_of(self.draw, verb)


# Kind: how many questions, and what draws one.
KINDS = {"sums to 20": (40, lambda e: e.sum(20)), "sums to 60": (80, lambda e: e.sum(60)),
         "differences": (40, Examiner.difference), "repeat": (40, Examiner.repeat), "which word": (40, Examiner.word),
         "sorting": (40, Examiner.sorting), "comparison": (40, Examiner.comparison), "past tense": (30, Examiner.past),
         "plural": (30, Examiner.plural), "letters": (40, Examiner.letter)}


def alone(examiner):
    """Return [[(kind, question, answer)], ...]: each question in a chat of its own, no question twice."""
    chats = []
    for kind, (count, draw) in KINDS.items():
        answers = dict(draw(examiner) for _ in range(10 * count))  # for some seeds there are fewer sums to 20
        chats += [[(kind, *pair)] for pair in list(answers.items())[:count]]
    return chats


def sessions(examiner, count=120):
    """Return chats of ten questions of mixed kinds; each states a name, and asks for it up to five turns later."""
    chats = []
    for _ in range(count):
        kinds = examiner.rng.choices(list(KINDS), k=10)
        turns = [(kind, *KINDS[kind][1](examiner)) for kind in kinds]
        name, told = examiner.rng.choice(NAMES), examiner.rng.randint(0, 8)
        turns[told] = "name told", f"My name is {name}.", name
        turns[examiner.rng.randint(told + 1, min(told + 5, 9))] = "name asked", "What is my name?", name
        chats.append(turns)
    return chats


def main(argv):
    """Ask, and print the share of correct answers by kind, and by turn. Raises UserError or OSError."""
    cfg = config.load(Settings, argv, __doc__)
    settings = chat.Settings(checkpoint=cfg.checkpoint, temperature=0, turns=cfg.turns, device="cpu")
    session, examiner, answers = chat.load_session(settings)[0], Examiner(cfg.seed), []
    for turns in sessions(examiner) if cfg.sessions else alone(examiner):
        session.history = []
        for turn, (kind, question, wanted) in enumerate(turns, 1):
            answer = "".join(session.reply(session.enc.encode_ordinary(question), settings))
            right = wanted in answer if kind.startswith("name") else rules.result_of(answer) == wanted
            answers.append({"kind": kind, "turn": turn, "right": right})
            if cfg.show and not right:
                print(f"{kind:<12} turn {turn:<3} {question!r}: {answer!r}, not {wanted!r}")
    for by in ("kind", "turn")[:1 + cfg.sessions]:
        groups = defaultdict(list)
        for answer in answers:
            groups[answer[by]].append(answer["right"])
        for name, right in sorted(groups.items()):
            print(f"{by} {name:<12} {sum(right):>4} of {len(right):<4} {sum(right) / len(right):>5.0%}")
    right = sum(answer["right"] for answer in answers)
    print(f"all               {right:>4} of {len(answers):<4} {right / len(answers):>5.0%}")


if __name__ == "__main__":
    config.run(main)
