"""Which teacher teaches which problems of a pool, by their source."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from headwater.errors import InputError
from headwater.near_names import near


@dataclass(frozen=True, slots=True)
class Teachers:
    """The teachers of an arm as fingerprints: `others` by source, `default` of all other problems.

    where: the arm, as messages name it.
    """

    where: str
    default: str
    others: Mapping[str, str]

    def dealt(self, sources: Collection[str]) -> dict[str, tuple[str, ...]]:
        """Each teacher and the sources of a pool that it teaches, in order of their names.

        No sources: all of them, where there is one teacher. Errors: as of `by_source`.
        """
        apart = self.by_source(sources)
        if not apart:
            return {self.default: ()}
        found: dict[str, list[str]] = {self.default: []}
        for source in sorted(sources):
            found.setdefault(apart.get(source, self.default), []).append(source)
        return {teacher: tuple(taught) for teacher, taught in found.items()}

    def by_source(self, sources: Collection[str]) -> dict[str, str]:
        """Each source of a pool that another than the default teaches, and who does.

        Raises InputError for a source that the pool does not have, and where it has no other.
        """
        for source in self.others:
            if source not in sources:
                raise InputError(
                    f"{self.where}.teachers.{source}: no problem of a pool that the student learns "
                    f"on has this source; expected one of {', '.join(sorted(sources))}"
                    f"{near(source, sources)}, or a larger pool"
                )
        if self.others and not set(sources) - set(self.others):
            raise InputError(
                f"{self.where}.teachers: {', '.join(self.others)} are all sources of a pool that "
                "the student learns on; expected one that `teacher` teaches: make one of these "
                "the arm's teacher and leave it out here"
            )
        return {source: one for source, one in self.others.items() if one != self.default}
