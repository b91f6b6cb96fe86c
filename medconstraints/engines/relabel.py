"""DeepCut: a training whose labels are its own, within boxes, made anew every few epochs by a dense CRF."""

from __future__ import annotations

import copy
import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.inferers import Inferer, SimpleInferer
from monai.utils import convert_to_dst_type
from torch import Tensor

from medconstraints import checks
from medconstraints.crf import dense_crf
from medconstraints.engines.training import TargetTrainer

__all__ = ["BoxProposals", "RelabelTrainer"]

logger = logging.getLogger(__name__)


class BoxProposals:
    """The labels that items train with: their filled boxes, and once made the proposals of a network.

    A transform: it writes `weak_label`, (1, *S), by the item's "index" and "filled" (see `FilledBoxesd`). It changes
    while a run goes on, so what stands before it may be cached, and what comes behind it not.

    Args:
        num_classes: with the background.
        crf: arguments of `dense_crf`; None takes its defaults, which are the thesis's.

    Attributes:
        maps: index -> proposal (*S), uint8.
    """

    def __init__(self, *, num_classes: int, crf: Mapping[str, Any] | None = None) -> None:
        self.num_classes = checks.whole_number("num_classes", num_classes, 2)
        self.crf = dict(crf or {})
        self.maps: dict[int, Tensor] = {}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the weak label to a copy of `data`."""
        item = dict(data)
        filled = item.pop("filled")
        proposal = self.maps.get(int(item["index"]))
        item["weak_label"] = filled
        if proposal is not None:
            item["weak_label"] = convert_to_dst_type(proposal[None], filled, dtype=torch.float32)[0]
        return item

    def propose(
        self, logits: Tensor, image: Tensor, filled: Tensor, *, spacing_mm: Sequence[float] | None = None
    ) -> Tensor:
        """Labels (*S) of one image: the field's, each class within its own boxes alone.

        Args:
            logits: (C, *S).
            image: (M, *S).
            filled: (*S).
            spacing_mm: of the image; None counts the widths of the field in voxels.
        """
        probabilities = dense_crf(logits.softmax(0)[None], image[None], spacing_mm=spacing_mm, **self.crf)[0]
        for cls in range(1, self.num_classes):
            probabilities[cls] = probabilities[cls].masked_fill(filled != cls, -1.0)
        return probabilities.argmax(0).to(torch.uint8).cpu()

    def state_dict(self) -> dict[str, Tensor]:
        """All proposals."""
        return {str(index): proposal for index, proposal in self.maps.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put them back."""
        self.maps = {int(index): proposal for index, proposal in state.items()}


class RelabelTrainer(TargetTrainer):
    """Trains on filled boxes, and every few epochs on proposals that the network and a dense CRF made of them.

    After each round of epochs every training image gets new labels (`BoxProposals.propose`), the weights become those
    that the first round began with, and the optimizer forgets (Rajchl et al. 2017, "DeepCut", as compared with in
    Kervadec 2020, section 6.4).

    Args:
        proposals: labels, a transform of `dataset`; name it among the `objects` of `training_handlers`.
        proposal_dataset: the images of `dataset` with "image", "filled" and "index", without anything random.
        every: epochs of a round.
        proposal_inferer: None is a `SimpleInferer`; a sliding window for volumes that are larger than the patches.
        options: the other arguments of `TargetTrainer`.

    Raises:
        ValueError: several processes, or an argument is outside its range.
    """

    def __init__(
        self,
        *,
        proposals: BoxProposals,
        proposal_dataset: Any,
        every: int = 10,
        proposal_inferer: Inferer | None = None,
        **options: Any,
    ) -> None:
        if idist.get_world_size() > 1:
            raise ValueError("RelabelTrainer: expected one process, which makes all proposals; start without torchrun.")
        self.proposals, self.proposal_dataset = proposals, proposal_dataset
        self.every = checks.whole_number("every", every, 1)
        self.proposal_inferer = proposal_inferer or SimpleInferer()
        handlers = options.pop("train_handlers", None)
        super().__init__(**options)
        self._first = copy.deepcopy(self.network.state_dict())
        # Before the handlers, which seed the epoch: what is drawn here must not shift what is drawn there.
        self.add_event_handler(Events.EPOCH_STARTED, self._begin)
        self._register_handlers(handlers or ())

    def _begin(self, engine: Engine) -> None:
        """A new round: new labels, new weights. The first one has the boxes and the weights it was given."""
        finished, rest = divmod(engine.state.epoch - 1, self.every)
        if rest or not finished:
            return
        self._relabel()
        self.network.load_state_dict(self._first)
        self.optimizer.state.clear()

    @torch.no_grad()
    def _relabel(self) -> None:
        self.network.eval()
        changed, inside = 0, 0
        for item in self.proposal_dataset:
            spacing = checks.affine_spacing(item["image"], "image") if isinstance(item["image"], MetaTensor) else None
            image = checks.plain(item["image"]).to(self.state.device)
            filled = checks.plain(item["filled"])[0].to(self.state.device)
            logits = self.proposal_inferer(image[None], self.network)[0]
            proposal = self.proposals.propose(logits.float(), image, filled, spacing_mm=spacing)
            index = int(item["index"])
            before = self.proposals.maps.get(index, filled.cpu())
            changed += int((proposal != before).sum())
            inside += int((filled > 0).sum())
            self.proposals.maps[index] = proposal
        logger.info("new proposals: %.1f %% of the voxels in boxes changed", 100 * changed / max(inside, 1))
        self.network.train()
