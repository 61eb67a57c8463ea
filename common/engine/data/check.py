"""What a check of a data set found, and how it is told."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Check:
    """Counts by name, one sentence per problem, the splits without a usable sample, and what is worth knowing."""

    place: str  # the data set's folder, for the first line
    counts: dict[str, int]
    problems: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # handled as documented: no training stops at it

    def report(self) -> None:
        """Print it."""
        print(f"{self.place}: " + ", ".join(f"{count} {name}" for name, count in self.counts.items()))
        for sentence in [*self.notes, *self.problems]:
            print(f"  {sentence}")
        print("  complete" if not self.problems else f"  {len(self.problems)} problems")
        if self.empty:
            print(f"  nothing usable in: {', '.join(self.empty)}")

    def failed(self, on_broken: str) -> bool:
        """Whether a training with this `on_broken` would stop, or find nothing."""
        return bool(self.empty or (self.problems and on_broken == "raise"))
