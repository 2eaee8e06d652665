"""Text in, ids out, and back: everything between the service's record batches and the scheduler's requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from spark_llm.engine.constraints.compiler import ConstraintCompiler
from spark_llm.engine.constraints.matcher import CompiledConstraint
from spark_llm.engine.model.read_config import load_config
from spark_llm.engine.model.source import ModelSource
from spark_llm.engine.request import Constraint, TokenIds
from spark_llm.engine.service.protocol import StreamOpen, request_rows
from spark_llm.engine.text.batch import Ints, SegmentBatch
from spark_llm.engine.text.cuts import CutRule, cut_rule
from spark_llm.engine.text.segments import SegmentEncoder
from spark_llm.engine.text.shorten import shortened
from spark_llm.engine.text.template import ChatFrame, ChatTemplate, Turn
from spark_llm.engine.text.tokenizer import LoadedTokenizer, load_tokenizer
from spark_llm.engine.text.whole import WholeEncoder
from spark_llm.errors import LlmError

_CACHE_BYTES = 64 << 20
_MOST_FRAMES = 64
_SHORTENINGS = 4  # of a message until it fits: tokens beside a cut may come out otherwise


class TextPipeline:
    """The tokenizer and chat template of one model. Safe to call from several threads.

    cache_bytes: bound of the memory that remembers encoded pieces between batches. vocab_size, eos_ids: of the model,
    for constraints.
    Raises LLM_CHAT_TEMPLATE_INVALID for a template that cannot frame a user message.
    """

    def __init__(
        self,
        loaded: LoadedTokenizer,
        cache_bytes: int = _CACHE_BYTES,
        *,
        vocab_size: int = 0,
        eos_ids: Sequence[int] = (),
    ) -> None:
        self.name = loaded.name
        self.vocab_size = vocab_size or loaded.tokenizer.get_vocab_size()
        self._tokenizer: Tokenizer = loaded.tokenizer
        self._cache_bytes = cache_bytes
        self._template = None
        if loaded.chat_template is not None:
            self._template = ChatTemplate(loaded.chat_template, loaded.special_tokens, loaded.name)
        self._plain = ChatFrame(_put_before_text(self._tokenizer), "", plain=True)
        self.cut_rule: CutRule | None = cut_rule(self._tokenizer)
        self._whole: WholeEncoder | None = None
        self._segments: SegmentEncoder | None = None
        if self.cut_rule is not None:
            self._segments = SegmentEncoder(self._tokenizer, self.cut_rule, cache_bytes)
        self._constraints = ConstraintCompiler(self._tokenizer, self.vocab_size, eos_ids)
        self._frames: dict[str | None, ChatFrame] = {}
        self._limit = 0
        self.frame(None)  # a template that fails, fails when the engine starts

    @classmethod
    def load(cls, source: ModelSource) -> TextPipeline:
        """The pipeline of a model.

        Raises LLM_TOKENIZER_MISSING, also when the tokenizer has more tokens than the model, and
        LLM_CHAT_TEMPLATE_INVALID.
        """
        loaded = load_tokenizer(source)
        tokens = loaded.tokenizer.get_vocab_size(with_added_tokens=False)
        config = load_config(source)
        vocab_size = config.vocab_size
        if tokens > vocab_size:
            reason = f"the tokenizer has {tokens} tokens, the model {vocab_size}"
            raise LlmError("LLM_TOKENIZER_MISSING", model=source.name, reason=reason)
        return cls(loaded, vocab_size=vocab_size, eos_ids=config.eos_ids)

    def keep_within(self, limit: int) -> None:
        """Prompt and answer have room for ``limit`` tokens: what streams that truncate are cut to."""
        self._limit = limit

    def frame(self, system: str | None) -> ChatFrame:
        """The text around a user message. Raises LLM_CHAT_TEMPLATE_INVALID (for example: no system message)."""
        if system not in self._frames:
            if len(self._frames) >= _MOST_FRAMES:
                self._frames.clear()
            self._frames[system] = self._make_frame(system)
        return self._frames[system]

    def encode(self, header: StreamOpen, batch: pa.RecordBatch) -> tuple[list[TokenIds], Ints]:
        """The prompts of a REQUEST_SCHEMA batch, int32 [tokens] each, and int64 [rows] of instruction tokens.

        A row's message is its segments joined, without the newline that ends the last one. Instruction tokens
        are the leading ones of template and instruction segments.
        """
        return self.encode_rows(header, batch)[:2]

    def encode_rows(self, header: StreamOpen, batch: pa.RecordBatch) -> tuple[list[TokenIds], Ints, Ints]:
        """The same, and int64 [rows] of the leading tokens that the prompts of later calls share (0: no such)."""
        frame = self.frame(header.system)
        segments = SegmentBatch.from_arrow(batch.column("segments"))
        found = self._encoded(header, frame, segments)
        most = self._limit - header.params.max_tokens
        if header.truncate and self._limit and any(len(prompt) > most for prompt in found[0]):
            found = self._encoded(header, frame, self._shortened(header, frame, segments, found[0], most))
        return found

    def _encoded(
        self, header: StreamOpen, frame: ChatFrame, segments: SegmentBatch
    ) -> tuple[list[TokenIds], Ints, Ints]:
        encoder: SegmentEncoder | WholeEncoder
        if self._segments is not None and self._segments.supports(frame):
            encoder = self._segments
        else:
            encoder = self._whole_encoder()
        shared = (header.shared_segments,) if header.later_calls or header.shared_segments else ()
        prompts, counts = encoder.encode(frame, segments, (header.instruction_segments, *shared))
        return prompts, counts[0], counts[1] if shared else np.zeros(len(prompts), np.int64)

    def _shortened(
        self, header: StreamOpen, frame: ChatFrame, batch: SegmentBatch, prompts: Sequence[TokenIds], most: int
    ) -> SegmentBatch:
        """The batch with its longest fields cut where a prompt has more than ``most`` tokens, and can be shortened."""
        rows = [batch.row(number) for number in range(len(prompts))]
        for number, prompt in enumerate(prompts):
            length, row = len(prompt), rows[number]
            before = header.instruction_segments
            fields = range(before, len(row)) if before else range(len(row) - 1)
            for _ in range(_SHORTENINGS):
                if length <= most:
                    break
                cut = shortened(row, fields, length - most, self._offsets)
                if cut is None:
                    break
                rows[number] = row = cut
                length = len(self._encoded(header, frame, SegmentBatch.of_rows([row]))[0][0])
        return SegmentBatch.of_rows(rows)

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        offsets: list[tuple[int, int]] = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return offsets

    def constrain(self, system: str | None, constraint: Constraint) -> CompiledConstraint:
        """What answers to prompts with this system message keep to. Raises LLM_INVALID_CONSTRAINT.

        No token of the prompt is given up for it (token healing): a chat template's last token is one that answers do
        not lengthen, and a prefix that rows share must not hang on what they answer.
        """
        return self._constraints.compile(constraint, self.frame(system).suffix)

    def encode_conversation(self, messages: Sequence[Turn]) -> TokenIds:
        """The prompt of a conversation, int32 [tokens]; that of one user message is as ``encode`` makes it.

        Raises LLM_CHAT_TEMPLATE_INVALID.
        """
        roles = [turn["role"] for turn in messages]
        if roles in (["user"], ["system", "user"]):
            system = messages[0]["content"] if len(roles) == 2 else None
            # with the newline that ends a message's last segment, and is no part of it
            text = pa.array([messages[-1]["content"] + "\n"]).dictionary_encode()
            row = request_rows([0], pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), text))
            return self.encode(StreamOpen(system=system), row)[0][0]
        if self._template is None:
            reason = "the model has no chat template, so it takes one user message only"
            raise LlmError("LLM_CHAT_TEMPLATE_INVALID", model=self.name, reason=reason)
        return self._whole_encoder().encode_pieces(self._template.conversation(messages))

    def encode_text(self, text: str) -> TokenIds:
        """A prompt as it is, without a chat template, int32 [tokens]; it may spell special tokens."""
        return self._whole_encoder().encode_pieces([(f"{self._plain.prefix}{text}", False)])

    def decode(self, outputs: Sequence[Sequence[int]], stop: Sequence[str] = (), strips: bool = True) -> list[str]:
        """The answers' texts: without special tokens, cut before the first stop string, outer white space off.

        Models begin or end answers with a space or newline at will; SQL compares with ``= 'yes'``. strips False: it
        stays.
        """
        texts = self._tokenizer.decode_batch([list(ids) for ids in outputs], skip_special_tokens=True)
        texts = [_cut_at(text, stop) for text in texts]
        return [text.strip() for text in texts] if strips else texts

    def decoder(self) -> Callable[[int], str]:
        """Turns the tokens of one answer into text as they come: each call returns what has become certain."""
        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self._tokenizer, token) or ""

    def stop_checker(self, stop: Sequence[str]) -> Callable[[Sequence[int]], bool] | None:
        """Says whether the last token of an answer completed a stop string; None when there is none.

        To be asked after every token. Decodes only as many last tokens as the longest stop string has bytes
        (each token is at least one), and a few more for characters cut at the window's start.
        """
        wanted = tuple(text for text in stop if text)
        if not wanted:
            return None
        window = max(len(text.encode()) for text in wanted) + 8

        def is_stopped(output: Sequence[int]) -> bool:
            text = self._tokenizer.decode(list(output[-window:]), skip_special_tokens=True)
            return any(end in text for end in wanted)

        return is_stopped

    def _whole_encoder(self) -> WholeEncoder:
        self._whole = self._whole or WholeEncoder(self._tokenizer, self._cache_bytes)
        return self._whole

    def _make_frame(self, system: str | None) -> ChatFrame:
        if self._template is not None:
            return self._template.frame(system)
        if system is None:
            return self._plain
        reason = "the model has no chat template, so it takes no system message; put it into the prompt"
        raise LlmError("LLM_CHAT_TEMPLATE_INVALID", model=self.name, reason=reason)


def _cut_at(text: str, stop: Sequence[str]) -> str:
    ends = [position for end in stop if end and (position := text.find(end)) >= 0]
    return text[: min(ends)] if ends else text


def _put_before_text(tokenizer: Tokenizer) -> str:
    """What the tokenizer's post-processor puts before a text, such as ``<s>``."""
    text = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(text) + 1):
        if full[start : start + len(text)] == text:
            return "".join(tokenizer.id_to_token(token) or "" for token in full[:start])
    return ""
