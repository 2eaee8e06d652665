"""Runs planned steps on a GPU: launches without waiting, so that the host plans the next step meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spark_llm.engine.constraints.step import masking
from spark_llm.engine.cuda.attention_plan import FIELDS, LONG_TILES, Device, lay_out
from spark_llm.engine.cuda.chooser import Chooser, lay_choices
from spark_llm.engine.cuda.decoder import DeviceDecoder, DeviceStep
from spark_llm.engine.cuda.graphs import DecodeGraphs
from spark_llm.engine.cuda.inputs import Ints, Staging
from spark_llm.engine.cuda.pool import DevicePool
from spark_llm.engine.cuda.sampler import Sampler
from spark_llm.engine.cuda.step import SharedPrefixes, StepInputs, flat_updates, lay_flat
from spark_llm.engine.cuda.team import DeviceLostError, Team
from spark_llm.engine.model.config import ModelConfig
from spark_llm.engine.scheduling.plan import StepPlan

# What a lost device raises: every later call fails too, so the process must end, and the next one answers the rows.
_LOST: tuple[type[Exception], ...] = (torch.AcceleratorError,)
_PIECE = 1 << 17  # entries of the page table that are told at a time
_STAGING = 1 << 18  # int32 of inputs at first; grows to what steps need
_LOOK_SECONDS = 0.0001  # between two looks at a step that may wait for a rank


class DevicePending:
    """Tokens on their way back to the host. order: where the plan's n-th answer is among them.

    log_probs: float32, of the answers at ``listed``, on their way, too; None: of no answer.
    lost: set when another rank has ended, for which the device would wait for ever.
    """

    def __init__(
        self, tokens: Tensor, event: torch.cuda.Event | None, order: npt.NDArray[np.int64],
        lost: threading.Event | None = None, log_probs: Tensor | None = None, listed: Ints | None = None,
    ) -> None:  # fmt: skip
        self._tokens = tokens
        self._log_probs = log_probs
        self._listed = listed
        self._event = event
        self._order = order
        self._lost = lost

    def tokens(self) -> npt.NDArray[np.int32]:
        """Waits; one token for each row that samples, in the plan's order."""
        if self._event is not None:
            try:
                self._wait(self._event)
            except _LOST as error:
                raise DeviceLostError(str(error)) from error
        tokens: npt.NDArray[np.int32] = self._tokens.numpy()[self._order]
        return tokens

    def log_probs(self) -> npt.NDArray[np.float32]:
        """In the plan's order, once ``tokens`` has waited; NaN where there is none."""
        found = np.full(len(self._tokens), np.nan, np.float32)
        if self._log_probs is not None:
            found[self._listed] = self._log_probs.numpy()
        return found[self._order]

    def _wait(self, event: torch.cuda.Event) -> None:
        if self._lost is None:
            event.synchronize()
            return
        while not event.query():  # type: ignore[no-untyped-call]
            if self._lost.wait(_LOOK_SECONDS):
                raise DeviceLostError("another rank of the engine has ended")


class DeviceRunner:
    """A decoder, its pool and what the host knows of them. Not thread-safe.

    Of several ranks each has one: rank 0's, with the others as its ``team``, launches plans, theirs execute what it
    laid out.

    graphs False: every step is launched kernel by kernel. most_results: partial attention results (parts x tokens) that
    a step may need; one that would need more reads prefixes row by row. None: no limit.
    """

    depth = 2

    def __init__(
        self,
        decoder: DeviceDecoder,
        pool: DevicePool,
        layout: Device,
        *,
        graphs: bool = True,
        most_results: int | None = None,
        team: Team | None = None,
    ) -> None:
        self.decoder = decoder
        self.pool = pool
        self.layout = layout
        self._most_results = most_results
        self._plain = replace(layout, cascade=False, splits=False)
        self._prefixes = SharedPrefixes(pool.lanes)
        self._staging = Staging(_STAGING, decoder.device)
        self._sampler = Sampler(decoder.device, decoder.config.vocab_size, decoder.ranks)
        self._chooser = Chooser(self._sampler, self._staging, decoder.config.vocab_size, decoder.ranks)
        self._team = team
        cuda = decoder.device.type == "cuda"
        self._cuda = cuda
        self._graphs = DecodeGraphs(decoder, pool, layout) if graphs and cuda else None

    @property
    def config(self) -> ModelConfig:
        """The shape of the model; of several ranks, of this one's part."""
        return self.decoder.config

    def prepare(self) -> None:
        """Captures the graphs."""
        if self._graphs is not None:
            self._graphs.capture(self.pool.lanes)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> DevicePending:
        """Start a step; returns before it has run. RuntimeError (out of memory, say): nothing of it will count.

        DeviceLostError: no further step can run. So it is with several ranks, of which one may have failed alone.
        """
        inputs = self._lay_out(plan)
        lost: tuple[type[Exception], ...] = _LOST
        with masking(plan.choices, None if inputs.choices is None else inputs.choices.masks) as masks:
            if self._team is not None:
                masks.wait()  # the other ranks are told them
                self._team.send(inputs)  # before this rank's launches: all launch side by side
                lost = (Exception,)
            try:
                tokens, log_probs = self.execute(inputs, masks.wait)
                return self._bring_back(tokens, log_probs, inputs)
            except lost as error:
                raise DeviceLostError(str(error)) from error

    def _lay_out(self, plan: StepPlan) -> StepInputs:
        step = lay_flat(plan, self._prefixes, self.layout)
        updates = flat_updates(plan.page_updates, self.pool.width)
        layout = lay_out(step.members, step.long_rows, plan.lanes.table, self.layout)
        if self._most_results is not None and layout.most_parts * len(layout.parts) > self._most_results:
            layout = lay_out(step.members, step.long_rows, plan.lanes.table, self._plain)
        choices = lay_choices(plan.choices, step.answer_order, self.config.vocab_size)
        return StepInputs(updates, step, layout, choices)

    @torch.inference_mode()
    def execute(self, inputs: StepInputs, ready: Callable[[], None] = lambda: None) -> tuple[Tensor, Tensor | None]:
        """Launches a step: the tokens of the rows that sample, int32 on the device. Arrays are read before it returns.

        And the log-probabilities of those with candidates, float32. ready: waits for masks that are still being made.
        What it raises leaves the ranks, if there are several, in disagreement.
        """
        if self._cuda:
            torch.cuda.set_device(self.decoder.device)  # a thread's own: another one loaded the model
        self._tell_pages(*inputs.updates)
        step, choices, log_probs = inputs.step, inputs.choices, None
        if len(step.told):
            told = self._staging.upload({"lanes": step.told, "tokens": step.told_tokens})
            self.pool.last_tokens.index_copy_(0, told["lanes"].long(), told["tokens"])
        graphs = self._graphs if step.only_decodes else None
        narrows = graphs is None and self.decoder.reads_candidates and self._chooser.narrows(choices, step.sampling)
        logits, lanes = self._forward(inputs, graphs, narrows=narrows)
        if choices is None:
            tokens = self._sampler.sample(logits, step.sampling)
        elif narrows:
            tokens, log_probs = self._chooser.choose_listed(logits, choices)
        else:
            tokens, log_probs = self._chooser.choose(logits, choices, step.sampling, ready)
        self.pool.last_tokens.index_copy_(0, lanes, tokens)
        return tokens, log_probs

    def _forward(self, inputs: StepInputs, graphs: DecodeGraphs | None, *, narrows: bool) -> tuple[Tensor, Tensor]:
        """Logits of the rows that sample, and their lanes (int64), on the device. narrows: of their candidates only."""
        step, layout = inputs.step, inputs.layout
        if graphs is not None:
            found = graphs.run(step, layout, self._staging)
            if found is not None:
                return found
        gathers = len(step.last) < len(step.tokens)
        arrays = {
            "tokens": step.tokens,
            "positions": step.positions,
            "lanes": step.lanes,
            "order": layout.order,
            "own": layout.own,
            "shared": layout.shared,
            "long": layout.long,
            "parts": layout.parts,
            "last": step.last,
            "sample_lanes": step.lanes[step.last],
        }
        if narrows and inputs.choices is not None:
            arrays["candidates"] = inputs.choices.by_answer()
        views = self._staging.upload(arrays)
        decodes = step.decodes
        if decodes:
            views["tokens"][:decodes] = self.pool.last_tokens.index_select(0, views["lanes"][:decodes])
        merges = layout.most_parts > 1
        if merges:
            self.decoder.reserve_parts(layout.most_parts * len(layout.parts))
        logits = self.decoder.forward(
            DeviceStep(
                tokens=views["tokens"],
                positions=views["positions"],
                lanes=views["lanes"],
                order=views["order"],
                own=views["own"],
                shared=views["shared"],
                long=views["long"],
                parts=views["parts"] if merges else None,
                most_parts=layout.most_parts,
                last=views["last"] if gathers else None,
                long_tile=layout.long_tile,
                candidates=views.get("candidates"),
            ),
            self.pool,
        )
        return logits, views["sample_lanes"].long()

    def _tell_pages(self, at: Ints, pages: Ints) -> None:
        """Write to the device's page table, in pieces: a step of many rows over long prefixes has millions."""
        for begin in range(0, len(at), _PIECE):
            piece = slice(begin, begin + _PIECE)
            views = self._staging.upload({"at": at[piece], "pages": pages[piece]})
            self.pool.table.view(-1).index_copy_(0, views["at"].long(), views["pages"])

    def _bring_back(self, tokens: Tensor, log_probs: Tensor | None, inputs: StepInputs) -> DevicePending:
        host = self._copy(tokens)
        own = None if log_probs is None else self._copy(log_probs)
        event = None
        if self._cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        lost = self._team.lost if self._team is not None else None
        listed = None if inputs.choices is None else inputs.choices.listed
        return DevicePending(host, event, inputs.step.answer_order, lost, own, listed)

    def _copy(self, values: Tensor) -> Tensor:
        host = torch.empty(len(values), dtype=values.dtype, pin_memory=self._cuda)
        host.copy_(values, non_blocking=True)
        return host

    def profile(self, tokens: int, samples: int) -> None:
        """Runs a step of the largest size over the padding's page, so that the peak of memory is known."""
        scratch = self.pool.scratch_lane
        lanes = np.full(tokens, scratch, np.int32)
        zeros = np.zeros(tokens, np.int32)
        none = np.empty((0, FIELDS), np.int32)
        last = np.arange(samples, dtype=np.int32)
        views = self._staging.upload({"zeros": zeros, "lanes": lanes, "none": none, "last": last})
        step = DeviceStep(
            tokens=views["zeros"], positions=views["zeros"], lanes=views["lanes"], order=views["zeros"],
            own=views["none"], shared=views["none"], long=views["none"], parts=None, most_parts=1,
            last=views["last"] if samples < tokens else None,
        )  # fmt: skip
        logits = self.decoder.forward(step, self.pool)
        self._sampler.sample(logits, None)
        self.decoder.ranks.whole(logits, self.config.vocab_size)  # which rows that draw need
        for long_tile in LONG_TILES:
            self._try_attention(long_tile)

    def _try_attention(self, long_tile: int) -> None:
        """A step of one item of each kind: what cannot run here fails when the engine starts, and is compiled then."""
        scratch = self.pool.scratch_lane
        arrays = {
            "zeros": np.zeros(2, np.int32),
            "lanes": np.full(2, scratch, np.int32),
            "own": np.array([[0, 1, scratch, 0, 1, -1, 0, 0]], np.int32),
            "shared": np.array([[0, 1, scratch, 0, 1, -1, 1, 0]], np.int32),
            "long": np.array([[1, 1, scratch, 0, 1, 0, 0, 1]], np.int32),
            "parts": np.array([2], np.int32),
        }
        views = self._staging.upload(arrays)
        self.decoder.reserve_parts(2)
        step = DeviceStep(
            tokens=views["zeros"], positions=views["zeros"], lanes=views["lanes"], order=views["zeros"],
            own=views["own"], shared=views["shared"], long=views["long"], parts=views["parts"], most_parts=2, last=None,
            long_tile=long_tile,
        )  # fmt: skip
        self.decoder.forward(step, self.pool)
