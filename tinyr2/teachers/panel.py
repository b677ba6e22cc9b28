"""Many teachers: who judges which answer, and what becomes of several opinions.

In: the rollouts of a step, then its micro-batches. Out: the opinions that the loss reads. Each counts with its weight:
the sum of weighted reverse KLs over full vocabularies is DeepSeek-V4's merge of experts (arXiv 2606.19348). An average
or a product of the teachers' distributions is one opinion.
"""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor

from tinyr2.core.errors import RunError
from tinyr2.core.types import Batch, Rollout
from tinyr2.models.head import Blend, Head
from tinyr2.teachers.member import Member
from tinyr2.teachers.opinion import Opinion, Whole

Combine = Literal["sum", "average", "product"]


class Panel:
    """The teachers of a run, in the order of the config."""

    def __init__(self, members: Sequence[Member], combine: Combine = "sum", student: Head | None = None):
        """student: its head, for members that weigh the student's own boundaries."""
        self.members, self._combine, self._student, self._progress = tuple(members), combine, student, 0.0

    def prepare(self, rollouts: Sequence[Rollout], progress: float) -> None:
        """Before a step's micro-batches: one teacher after another reads what it has to read ahead of time."""
        self._progress = progress
        for member in self.members:
            if member.seat.weight_at(progress) > 0:
                member.prepare(rollouts)

    def __call__(self, rollouts: Sequence[Rollout], batch: Batch, states: Tensor | None) -> list[Opinion]:
        """The opinions of a micro-batch; a teacher whose weight is 0 is not asked."""
        found = []
        for member in self.members:
            weight = member.seat.weight_at(self._progress)
            if weight > 0:
                found.append(member.opinion(rollouts, batch, states, self._student, weight))
        said = [o for o in found if o is not None]
        if self._combine == "sum":
            return said
        blended = [o for o in said if o.anchor is None]
        return [*([_blended(blended, self._combine)] if blended else []), *(o for o in said if o.anchor is not None)]

    def metrics(self) -> dict[str, float]:
        """Of the step that was prepared last: the share of its answers that a teacher got no paper of, if any."""
        return {f"teacher/{m.seat.name}/unread": missed / total
                for m in self.members for missed, total in (m.unread,) if missed}

    def company(self, rollout: Rollout) -> Hashable:
        """Who judges this rollout: those with other judges travel in other micro-batches."""
        return tuple(m.seat.name for m in self.members if m.seat.judges(rollout))


def _blended(opinions: Sequence[Opinion], how: Literal["average", "product"]) -> Opinion:
    """One opinion of several that compare the same tokens in one vocabulary; it counts once, whatever the weights."""
    if len(opinions) == 1:
        return replace(opinions[0], weight=1.0)
    assert all(o.whole is not None and o.whole.pairs is None for o in opinions), "a blend is of whole distributions"
    places = [o.whole.at for o in opinions]
    if not (all(p is None for p in places) or all(p is not None and p.equal(places[0]) for p in places)):
        raise RunError(f"{' and '.join(o.name for o in opinions)} do not read the same answers (some are too long for "
                       "one of them, or there was nothing to show), so that nothing can be blended; take "
                       "panel.combine=sum, or a teacher with a longer context")
    blend = Blend(hidden=tuple(o.whole.hidden for o in opinions), heads=tuple(o.whole.head for o in opinions),
                  weights=tuple(o.weight for o in opinions), how=how)
    facts = {name: fact for o in opinions for name, fact in o.facts.items()}
    return replace(opinions[0], name="+".join(o.name for o in opinions), weight=1.0, facts=facts,
                   whole=Whole(blend=blend, at=places[0]))
