"""Words, numbers and wordings that data/rules.py draws for synthetic questions.

An operand is what a question is about: a word, a sentence, a pair of numbers. A tenth of them,
chosen by a hash of the seed, are held out: no training row contains them, and test questions use
only them, so that correct answers show that the rule was learned. Half of the words are invented,
since the rules hold for "florp" too. Operands of the hand-written rows are never held out.
"""
import random
import re
import zlib
from itertools import chain
from pathlib import Path

from data.conversation import read_conversations

FOLDER = Path(__file__).parent

# An invented word is an onset and a rime from data/words.txt, sometimes after a syllable, or an
# onset, vowel, middle and end. These were chosen so that no combination is or contains a rude word.
SYLLABLES = ("ac al ar bam bor com dan em en ex fan gar ger ham in ker kin lan mar nor o per ral "
             "re sam ser tam un ven win").split()
ONSETS = "bl br cl dr fl fr gl gr l m pl qu r sm spl st t th thr v".split()
BEFORE_RIMES = [*ONSETS, *"c d f g h j k n p pr s sc sk sn sp sw w y z".split()]
VOWELS = "a e i o u a e i o u ai ea ee oa oo ou".split()
MIDDLES = ("b bb ck d dd dg ff ft gg k l ll ld lm lt m mb mm mp n nd ng nk nn nt pp "
           "r rb rk rl rm rr rt s sh sk st v x").split()
ENDS = "a e er le y et in ow en ent il op el oy ip".split()


def read_sections(path):
    """Return {section: lines} of a text file; "[name]" opens a section, "#" a comment."""
    sections = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            lines = sections[line.strip("[]")] = []
        elif line and not line.startswith("#"):
            lines.append(line)
    return sections


def read_words(path):
    """Return ({section: entries}, {("nouns" or "verbs", word): irregular form}) of words.txt."""
    words, irregular = read_sections(path), {}
    for name in words.keys() - {"sentences"}:
        entries = [entry.split() for line in words[name] for entry in line.split(",")]
        if name in ("nouns", "verbs"):
            irregular |= {(name, entry[0]): entry[1] for entry in entries if len(entry) == 2}
            entries = [entry[:1] for entry in entries]
        words[name] = [" ".join(entry) for entry in entries if entry]
    return words, irregular


def operand(*numbers):
    """Return numbers as one operand, in sorted order: "3 5" for 3 and 5, or for 5 and 3."""
    return " ".join(map(str, sorted(numbers)))


def operands_in(text):
    """Return the operands in a hand-written text: words, numbers, "3 5", "3 kilometers"."""
    numbers = re.findall("[0-9]+", text)
    return {*re.findall("[a-z]+", text.lower()), *re.findall("[0-9]+ [a-z]+s", text), *numbers,
            operand(*map(int, numbers))}


class Draw:
    """Draws random operands and wordings. All operands are on one side of the split: "train" draws
    no held-out ones, "held_out" and "made_up" draw only those."""

    def __init__(self, seed, operands):
        self.seed, self.held_out, self.made_up = seed, operands != "train", operands == "made_up"
        self.rng = random.Random(f"{seed} {operands}")
        self.wordings = read_sections(FOLDER / "wordings.txt")
        written = [[m["content"] for m in messages] for messages, _ in
                   read_conversations(FOLDER / "instruction" / "instruction-data.json")]
        self.questions = {text for texts in written for text in texts[::2]}
        self.known = set().union(*map(operands_in, chain(*written, *self.wordings.values())))
        words, self.irregular = read_words(FOLDER / "words.txt")
        self.made_up_words, self.rimes = words.pop("made up"), words.pop("rimes")
        self.real = set().union(*words.values(), self.irregular.values())
        self.units, self.facts = ([line.split("; ") for line in self.wordings.pop(name)]
                                  for name in ("units", "facts"))
        self.lists = {name: list(filter(self.fits, entries)) or entries
                      for name, entries in words.items()}

    def is_held_out(self, operand):
        """Whether an operand is one of the tenth that training never sees."""
        is_tenth = zlib.crc32(f"{self.seed} {operand}".encode()) % 10 == 0
        return operand in self.made_up_words or is_tenth and operand not in self.known

    def fits(self, text):
        """Whether a text is on this side of the split. One held-out word makes it held out."""
        return any(map(self.is_held_out, re.findall("[a-z]+", text.lower()))) == self.held_out

    def entry(self, section):
        return self.rng.choice(self.lists[section])

    def invented(self):
        """Return a word that does not exist but could."""
        choose = self.rng.choice
        if self.made_up and self.rng.random() < 0.3:
            return choose(self.made_up_words)
        while True:
            word = choose(ONSETS) + choose(VOWELS) + choose(MIDDLES) + choose(ENDS)
            kind = self.rng.random()
            if kind < 0.7:
                word = choose(BEFORE_RIMES) + choose(self.rimes)
            if kind < 0.4:
                word = choose(SYLLABLES) + word
            if word not in self.real and self.fits(word):
                return word

    def word(self, *sections):
        """Return a word of one of these sections, or an invented one."""
        if self.made_up or self.rng.random() < 0.5:
            return self.invented()
        return self.entry(self.rng.choice(sections or ("nouns", "nouns", "verbs", "adjectives")))

    def words(self, count):
        """Return different words. A quarter begin or end like an earlier one: to tell them apart, a
        model must copy them exactly."""
        words = []
        while len(words) < count:
            word = self.word()
            alike = any(word[:2] == other[:2] or word[-2:] == other[-2:] for other in words)
            if word not in words and (alike or not words or self.rng.random() < 0.15):
                words.append(word)
        return words

    def numbers(self, low, *highs, operand=operand):
        """Return a number from low to high for each of `highs`, with operand(*numbers) on this
        side of the split. If none qualify, draw larger ones. 0 and 1 make most questions trivial,
        so tests have neither."""
        low = max(low, 2) if self.held_out else low
        while True:
            numbers = [self.rng.randint(low, int(high)) for high in highs]
            if self.is_held_out(operand(*numbers)) == self.held_out:
                return numbers
            highs = [high + 0.02 for high in highs]  # larger by one after 50 misses

    def ask(self, *sections, **slots):
        """Return a wording of one of the sections, with its slots filled in."""
        lines = [line for section in sections for line in self.wordings[section]]
        return self.rng.choice(lines).replace("|", "\n").format(**slots)
