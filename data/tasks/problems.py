"""Arithmetic problems: drawn from a seed, split by what they are, and worked out column by column."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from thornback.contracts import ConfigError

OPERATORS = ("+", "-", "*")
SPLITS = ("train", "test")
_HASH_BITS = 32
_PATIENCE = 20_000  # draws without a new problem, after which there is none left

# How a problem is put. The first of each is the symbols; the others are word problems.
FORMS: dict[str, tuple[str, ...]] = {
    "+": (
        "{a} + {b}",
        "What is {a} plus {b}?",
        "Add {a} and {b}.",
        "Tom has {a} nuts and finds {b}. How many now?",
    ),
    "-": (
        "{a} - {b}",
        "What is {a} minus {b}?",
        "Take {b} from {a}.",
        "Tom has {a} nuts and eats {b}. How many now?",
    ),
    "*": (
        "{a} * {b}",
        "What is {a} times {b}?",
        "Multiply {a} by {b}.",
        "Tom has {a} bags of {b} nuts. How many nuts?",
    ),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """`a operator b`, put as form number `form` of `FORMS[operator]`. a >= b where the operator is "-"."""

    a: int
    operator: str
    b: int
    form: int = 0

    @property
    def key(self) -> str:
        """Unique and stable: seeds and anchors hang on it."""
        return f"{self.a}{self.operator}{self.b}/{self.form}"

    @property
    def text(self) -> str:
        return FORMS[self.operator][self.form].format(a=self.a, b=self.b)

    @property
    def answer(self) -> int:
        return {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}[self.operator]

    def is_held_out(self, share: float) -> bool:
        """Whether the problem belongs to the test split: a hash of what is asked, however it is put and whichever
        operand comes first. So no seed, difficulty or form can bring a test problem into training."""
        a, b = sorted((self.a, self.b)) if self.operator != "-" else (self.a, self.b)
        digest = hashlib.blake2b(f"{a}{self.operator}{b}".encode(), digest_size=_HASH_BITS // 8).digest()
        return int.from_bytes(digest, "little") < share * 2**_HASH_BITS


@dataclass(frozen=True, slots=True)
class Difficulty:
    """How problems are drawn: operands of `digits` (lowest, highest) digits, each length alike; one of `operators`;
    `word_share` of them as word problems."""

    digits: tuple[int, int] = (2, 3)
    operators: Sequence[str] = ("+", "-")
    word_share: float = 0.25

    def __post_init__(self) -> None:
        low, high = self.digits
        if not 1 <= low <= high <= 12:
            raise ConfigError(f"arithmetic: digits are {low} to {high}; give a range within 1 to 12, lowest first.")
        if not self.operators or any(o not in OPERATORS for o in self.operators):
            raise ConfigError(f"arithmetic: operators are {list(self.operators)}; give some of {', '.join(OPERATORS)}.")
        if not 0.0 <= self.word_share <= 1.0:
            raise ConfigError(f"arithmetic: word_share is {self.word_share}; give a share in [0, 1].")

    def draw(self, rng: random.Random) -> Problem:
        operator = rng.choice(self.operators)
        a, b = (self._operand(rng) for _ in range(2))
        if operator == "-" and a < b:
            a, b = b, a
        form = rng.randrange(1, len(FORMS[operator])) if rng.random() < self.word_share else 0
        return Problem(a, operator, b, form)

    def _operand(self, rng: random.Random) -> int:
        digits = rng.randint(*self.digits)
        return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def draw_problems(
    difficulty: Difficulty, split: str, held_out: float, seed: int, stream: str = ""
) -> Iterator[Problem]:
    """Problems of a split without end, in an order that (seed, split, stream) fixes. They may repeat."""
    rng = random.Random(f"{seed}/{split}/{stream}")
    wasted = 0
    while True:
        problem = difficulty.draw(rng)
        if problem.is_held_out(held_out) == (split == "test"):
            wasted = 0
            yield problem
        else:
            wasted += 1
            if wasted > _PATIENCE:
                raise ConfigError(
                    f"arithmetic: there are no {split} problems of {difficulty}; make them more difficult."
                )


def distinct_problems(difficulty: Difficulty, split: str, held_out: float, seed: int, count: int) -> Iterator[Problem]:
    """`count` problems of a split, none twice. Raises `ConfigError` where there are not so many."""
    seen: set[str] = set()
    wasted = 0
    for problem in draw_problems(difficulty, split, held_out, seed):
        if len(seen) == count:
            return
        if problem.key not in seen:
            wasted = 0
            seen.add(problem.key)
            yield problem
        else:
            wasted += 1
            if wasted > _PATIENCE:
                raise ConfigError(
                    f"arithmetic: only {len(seen)} of {count} {split} problems exist with these digits and operators; "
                    f"ask for fewer (num_{split}), or for more digits."
                )


def working(problem: Problem) -> list[str]:
    """The steps of a written calculation, each `left=value`, in the order in which a hand does them.

    Sums and differences go column by column from the right, with the carry as a last term: 37 + 48 is
    `7+8=15`, `3+4+1=8`. A product is its partial products and their sums: 23 * 14 is `23*4=92`, `23*10=230`,
    `92+230=322`.
    """
    if problem.operator == "*":
        return _multiply(problem.a, problem.b)
    return _columns(problem.a, problem.b, problem.operator)


def _columns(a: int, b: int, operator: str) -> list[str]:
    width = max(len(str(a)), len(str(b)))
    steps, carry = [], 0
    for x, y in zip(reversed(f"{a:0{width}d}"), reversed(f"{b:0{width}d}"), strict=True):
        tail = f"{operator}1" if carry else ""
        if operator == "+":
            value = int(x) + int(y) + carry
            steps.append(f"{x}+{y}{tail}={value}")
            carry = int(value > 9)
        else:
            borrow = int(int(x) - int(y) - carry < 0)
            top = int(x) + 10 * borrow
            steps.append(f"{top}-{y}{tail}={top - int(y) - carry}")
            carry = borrow
    return steps


def _multiply(a: int, b: int) -> list[str]:
    steps, total = [], None
    for place, digit in enumerate(reversed(str(b))):
        factor = int(digit) * 10**place
        if factor == 0 and b != 0:
            continue
        steps.append(f"{a}*{factor}={a * factor}")
        if total is not None:
            steps.append(f"{total}+{a * factor}={total + a * factor}")
        total = (total or 0) + a * factor
    return steps
