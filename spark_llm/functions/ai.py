"""The AI functions for one task each: llm calls, with the names and arguments that Databricks' SQL has."""

from __future__ import annotations

from typing import Any

from spark_llm.functions import fields, queries
from spark_llm.functions.answer import Answer, chosen
from spark_llm.functions.signature import Bound, Function
from spark_llm.optimizer.catalyst.bridge import Expression

_REWRITTEN_TOKENS = 512  # of an answer as long as the text, where nothing else is said
_SENTIMENTS = ("positive", "negative", "neutral", "mixed")
_LANGUAGES = {
    "ar": "Arabic",
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "hi": "Hindi",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "nl": "Dutch",
    "pl": "Polish",
    "pt": "Portuguese",
    "ru": "Russian",
    "th": "Thai",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "vi": "Vietnamese",
    "zh": "Chinese",
}


def _gen(bound: Bound) -> Expression:
    return bound.builder.call(bound.session, bound.given["prompt"], (), bound.options)


def _of_text(bound: Bound, prompt: str, answer: Answer | None = None, **options: Any) -> Expression:
    """The call about ``content``, which stands as the field ``text`` in the prompt."""
    column = fields.field(bound.given["content"], "text", bound.builder.catalyst)
    return bound.builder.call(
        bound.session, bound.builder.text(prompt), [column], options | bound.options, answer=answer
    )


def _classify(bound: Bound) -> Expression:
    labels = bound.given["labels"]
    own = fields.is_text_array(labels) and not bound.builder.constants.is_constant(labels)
    return _of_text(bound, "Which label fits the text?", choices=labels if own else bound.texts("labels"))


def _extract(bound: Bound) -> Expression:
    labels = bound.texts("labels")
    returns = "STRUCT<" + ", ".join(f"`{label.replace('`', '``')}`: STRING" for label in labels) + ">"
    return _of_text(bound, "Extract this from the text; null is what it does not say.", returns=returns)


def _summarize(bound: Bound) -> Expression:
    words = bound.constant("max_words")
    words = 50 if words is None else words
    if isinstance(words, bool) or not isinstance(words, int) or words < 0:
        raise bound.wrong("max_words must be a whole number of at least 0")
    if not words:
        return _of_text(bound, "Summarize the text.", max_tokens=_REWRITTEN_TOKENS)
    return _of_text(bound, f"Summarize the text in at most {words} words.", max_tokens=16 + 2 * words)


def _translate(bound: Bound) -> Expression:
    language = bound.constant("to_lang")
    if not isinstance(language, str) or not language:
        raise bound.wrong("to_lang must be a language, as 'en' or 'English'")
    name = _LANGUAGES.get(language.lower(), language)
    return _rewritten(bound, f"Translate the text to {name}. Answer with the translation only.")


def _fix_grammar(bound: Bound) -> Expression:
    return _rewritten(bound, "Correct the grammar of the text. Answer with the corrected text only.")


def _mask(bound: Bound) -> Expression:
    labels = bound.texts("labels")
    kinds = f"{', '.join(labels[:-1])} and {labels[-1]}" if len(labels) > 1 else labels[0]
    return _rewritten(
        bound, f"Replace every {kinds} in the text by [MASKED] and leave the rest. Answer with the text only."
    )


def _rewritten(bound: Bound, prompt: str) -> Expression:
    return _of_text(bound, prompt, max_tokens=_REWRITTEN_TOKENS)


def _sentiment(bound: Bound) -> Expression:
    return _of_text(bound, "What is the sentiment of the text?", chosen(_SENTIMENTS))


_CONTENT = "content - a STRING; NULL gives NULL."
_LABELS = "labels - an ARRAY<STRING> of constants"

FUNCTIONS = (
    *queries.FUNCTIONS,
    Function(
        name="ai_gen",
        required=("prompt",),
        optional=(),
        returns="STRING",
        usage="Returns the model's answer to a prompt.",
        about=("prompt - a STRING.",),
        examples=("SELECT _FUNC_('Write a title for a post about ' || topic) FROM posts;",),
        build=_gen,
    ),
    Function(
        name="ai_classify",
        required=("content", "labels"),
        optional=(),
        returns="STRING, one of the labels",
        usage="Returns the label that fits a text.",
        about=(_CONTENT, f"{_LABELS}, or a column with each row's own labels."),
        examples=("SELECT _FUNC_(description, array('clothing', 'shoes', 'furniture')) FROM products;",),
        build=_classify,
        is_typed=True,
    ),
    Function(
        name="ai_extract",
        required=("content", "labels"),
        optional=(),
        returns="STRUCT with a STRING field for each label, NULL where the text does not have it",
        usage="Returns what a text says about each label.",
        about=(_CONTENT, f"{_LABELS}: the names of what is to be found."),
        examples=("SELECT _FUNC_('John lives in Paris.', array('person', 'location')).location;",),
        build=_extract,
        is_typed=True,
    ),
    Function(
        name="ai_summarize",
        required=("content",),
        optional=("max_words",),
        returns="STRING",
        usage="Returns a summary of a text.",
        about=(_CONTENT, "max_words - a constant: about how many words, 50 if it is left out, 0 is no limit."),
        examples=("SELECT _FUNC_(review, 20) FROM reviews;",),
        build=_summarize,
    ),
    Function(
        name="ai_translate",
        required=("content", "to_lang"),
        optional=(),
        returns="STRING",
        usage="Returns a text in another language.",
        about=(_CONTENT, "to_lang - a constant: the language, as 'es' or 'Spanish'."),
        examples=("SELECT _FUNC_('Hello, how are you?', 'es');",),
        build=_translate,
    ),
    Function(
        name="ai_fix_grammar",
        required=("content",),
        optional=(),
        returns="STRING",
        usage="Returns a text with its grammar corrected.",
        about=(_CONTENT,),
        examples=("SELECT _FUNC_('This sentence have some mistake');",),
        build=_fix_grammar,
    ),
    Function(
        name="ai_mask",
        required=("content", "labels"),
        optional=(),
        returns="STRING",
        usage="Returns a text in which what the labels name is [MASKED].",
        about=(_CONTENT, f"{_LABELS}: kinds of information, as 'person' or 'email'."),
        examples=("SELECT _FUNC_('Write to ann@example.com', array('email'));",),
        build=_mask,
    ),
    Function(
        name="ai_analyze_sentiment",
        required=("content",),
        optional=(),
        returns=f"STRING: {', '.join(_SENTIMENTS[:-1])} or {_SENTIMENTS[-1]}",
        usage="Returns the sentiment of a text.",
        about=(_CONTENT,),
        examples=("SELECT _FUNC_('I am happy');",),
        build=_sentiment,
        is_typed=True,
    ),
)
