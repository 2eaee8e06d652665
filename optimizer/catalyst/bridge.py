"""The driver's JVM as Catalyst code in Python needs it: compiled shims, Scala values, expressions, errors.

Nothing here knows a rule or a function; a Spark Connect client has no JVM and cannot use it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any, ClassVar

from spark_llm.errors import LlmError
from spark_llm.optimizer.catalyst.conditions import know_conditions

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

logger = logging.getLogger("spark_llm.optimizer")

# An object of the JVM (py4j types nothing); Node is a logical plan, Expression a Catalyst expression.
Jvm = Any
Node = Any
Expression = Any

_FIRST = ("trees.java", "shim.java")  # what the other files of Java stand on

# The names of PythonUDFs in plans, which shim.java looks for: of one call, and of several in one node.
UDF_NAME = "llm"
GROUP_NAME = "llm_group"


class Operator:
    """A Python callable as the JVM's ``UnaryOperator``: gets the session and what the shim has, returns a JVM object.

    What it raises is returned as a JVM exception, which the shim throws: users see an ordinary Spark error, not
    py4j's traceback of a traceback.
    """

    def __init__(self, catalyst: Catalyst, call: Callable[..., Jvm]) -> None:
        self._catalyst = catalyst
        self._call = call

    def apply(self, given: Jvm) -> Jvm:
        try:
            return self._call(*given)
        except Exception as error:
            return self._catalyst.exception(error)

    class Java:
        implements = ("java.util.function.UnaryOperator",)


class Catalyst:
    """Access to one JVM; ``Catalyst.of(spark)`` compiles the shims once for it."""

    _instances: ClassVar[dict[Any, Catalyst]] = {}  # by gateway, for the life of the process

    def __init__(self, gateway: Any) -> None:
        from pyspark.java_gateway import ensure_callback_server_started

        ensure_callback_server_started(gateway)
        self.gateway = gateway
        self.jvm = gateway.jvm
        self.expressions = self.jvm.org.apache.spark.sql.catalyst.expressions
        self.plans = self.jvm.org.apache.spark.sql.catalyst.plans.logical
        self.types = self.jvm.org.apache.spark.sql.types.DataTypes
        self.none = module(self.jvm.scala, "None")
        # Kept, as each name on the way to them is a search through all of Spark's jars, and rules ask all the time.
        self._to_seq = self.jvm.PythonUtils.toSeq
        self._is_instance = self.jvm.py4j.reflection.TypeUtil.isInstanceOf
        self._classes = self._compile()
        self._asked: dict[str, Jvm] = {}
        self._questions = self.questions("Plans")
        know_conditions(self.jvm, self.seq)

    @staticmethod
    def of(spark: SparkSession) -> Catalyst:
        """The bridge to the session's driver. LLM_NEEDS_DRIVER for a Spark Connect session."""
        if not hasattr(spark, "_jsparkSession"):
            raise LlmError("LLM_NEEDS_DRIVER")
        gateway = spark.sparkContext._gateway
        if gateway not in Catalyst._instances:
            Catalyst._instances[gateway] = Catalyst(gateway)
        return Catalyst._instances[gateway]

    # Shims

    def builder(self, call: Callable[[Jvm, Jvm], Expression]) -> Jvm:
        """A function builder of Catalyst: ``call(session, Seq of argument expressions)`` makes the expression."""
        return self._new("Builder", Operator(self, call))

    def rule(self, call: Callable[[Jvm, Node, bool], Node], is_early: bool = False) -> Jvm:
        """An optimizer rule: ``call(session, plan, explaining)`` gives the new plan, for plans that hold an llm() call.

        is_early: the rule is for plans whose calls still stand in expressions, and is asked about those only where a
        row may not need its call's value or a join's condition holds it. explaining: the plan is wanted only to be
        shown. An LlmError that ``call`` raises fails the query.
        """
        return self._new("Rule", Operator(self, call), is_early)

    def rule_builder(self, rule: Jvm) -> Jvm:
        """What ``SparkSessionExtensions.injectOptimizerRule`` takes."""
        return self._new("RuleBuilder", rule)

    def questions(self, name: str) -> Jvm:
        """The object of the compiled class ``sparkllm.<name>``, which a file of its own beside the shim may declare."""
        if name not in self._asked:
            self._asked[name] = self._new(name)
        return self._asked[name]

    def _compile(self) -> Jvm:
        """Compile every Java file of this folder; each sees the classes of those before it."""
        loader = self.jvm.java.lang.Thread.currentThread().getContextClassLoader()
        files = [f for f in resources.files("spark_llm.optimizer.catalyst").iterdir() if f.name.endswith(".java")]
        for file in sorted(files, key=lambda file: (file.name not in _FIRST, file.name != _FIRST[0], file.name)):
            compiler = self.jvm.org.codehaus.janino.SimpleCompiler()
            compiler.setParentClassLoader(loader)
            compiler.cook(file.read_text("utf-8"))
            loader = compiler.getClassLoader()
        return loader

    def _new(self, name: str, *arguments: Any) -> Jvm:
        constructor = self._classes.loadClass(f"sparkllm.{name}").getConstructors()[0]
        values = self.jvm.java.util.ArrayList()
        for argument in arguments:
            values.add(argument)
        return constructor.newInstance(values.toArray())

    # Scala values

    def seq(self, values: Iterable[Any]) -> Jvm:
        """An immutable Scala Seq of ``values``."""
        return self._to_seq(list(values)).toIndexedSeq()

    def map(self, values: Mapping[str, str]) -> Jvm:
        """An immutable Scala Map of ``values``."""
        return self.jvm.PythonUtils.toScalaMap(dict(values))

    def some(self, value: Any) -> Jvm:
        return self.jvm.scala.Some(value)

    def is_a(self, value: Jvm, class_name: str) -> bool:
        """Is ``value`` an instance of the class with this full name?"""
        return bool(self._is_instance(class_name, value))

    # Plans and expressions

    def literal(self, text: str | None) -> Expression:
        """A STRING literal."""
        return self.expressions.Literal.create(text, self.types.StringType)

    def number(self, value: int) -> Expression:
        """An INT literal."""
        return self.expressions.Literal.create(value, self.types.IntegerType)

    def repartition(self, expressions: Iterable[Expression], child: Node, partitions: int | None = None) -> Node:
        """An exchange of ``child`` by hash of the expressions; a number of partitions that is given stays as it is."""
        count = self.none if partitions is None else self.some(partitions)
        return self.plans.RepartitionByExpression(self.seq(expressions), child, count, self.none)

    def pretty_sql(self, expression: Expression) -> str:
        """The expression as Spark would write it as a column's name: ``upper(a)``."""
        return str(self._pretty(expression))

    @functools.cached_property
    def _pretty(self) -> Callable[[Expression], Jvm]:
        util = module(self.jvm.org.apache.spark.sql.catalyst.util, "package")
        arity = next(m.getParameterCount() for m in util.getClass().getMethods() if m.getName() == "toPrettySQL")
        defaults = [getattr(util, "toPrettySQL$default$2")()] if arity == 2 else []  # of newer versions
        return lambda expression: util.toPrettySQL(expression, *defaults)

    def is_attribute(self, expression: Expression) -> bool:
        """Is the expression a column of the node below?"""
        return bool(self.is_a(expression, "org.apache.spark.sql.catalyst.expressions.Attribute"))

    def numbered(self, expressions: Iterable[Expression]) -> list[int]:
        """For each expression the number of the first one that equals it, -1 for constants."""
        return [int(number) for number in str(self._questions.numbered(self.seq(expressions))).split()]

    def named(self, expression: Expression, name: str) -> Expression:
        """``expression AS name``, to be put into a Project; its ``toAttribute()`` refers to it."""
        identity = module(self.expressions, "NamedExpression").newExprId()
        return self.expressions.Alias(expression, name, identity, self.seq([]), self.none, self.seq([]))

    def ascending(self, expression: Expression) -> Expression:
        """``expression ASC NULLS FIRST``."""
        ascending = module(self.expressions, "Ascending")
        return self.expressions.SortOrder(expression, ascending, ascending.defaultNullOrdering(), self.seq([]))

    def with_children(self, node: Any, children: Iterable[Any]) -> Any:
        """A copy of a plan or an expression with other children."""
        return node.withNewChildren(self.seq(children))

    def holds_call(self, plan: Node) -> bool:
        """Does the plan hold an ArrowEvalPython of llm() calls?"""
        return bool(self._questions.holdsCall(plan))

    def is_call(self, node: Node) -> bool:
        """Is this very node an ArrowEvalPython of llm() calls?"""
        return bool(self._questions.isCall(node))

    def holds_python(self, plan: Node) -> bool:
        """Does the plan hold a Python function, llm() or another?"""
        return bool(self._questions.holdsPython(plan))

    def has_udf(self, plan: Node) -> bool:
        """Does the plan hold a function of the user's, in Python or for the JVM?"""
        return bool(self._questions.hasUdf(plan))

    def has_input(self, expression: Expression, plan: Node) -> bool:
        """Does the plan give all columns that the expression needs?"""
        return bool(self._questions.hasInput(expression, plan))

    def is_file_relation(self, leaf: Node) -> bool:
        return bool(self._questions.isFileRelation(leaf))

    def is_filled_cache(self, leaf: Node) -> bool:
        """Is the leaf a cached table whose rows are there, and need not be computed by a user's function again?"""
        return bool(self._questions.isFilledCache(leaf))

    def is_local_rdd(self, leaf: Node) -> bool:
        """Is the leaf an RDD of rows that the driver handed out (``createDataFrame(list)``)?"""
        return bool(self._questions.isLocalRdd(leaf))

    def has_equality(self, join: Node) -> bool:
        """Does the join compare a column of one side with one of the other?"""
        return bool(self._questions.hasEquality(join))

    def only_drops_nulls(self, node: Node) -> bool:
        """Is the Filter's condition nothing but IS NOT NULL of columns?"""
        return bool(self._questions.onlyDropsNulls(node))

    def equal_columns(self, join: Node) -> list[tuple[int, int]]:
        """The expression ids of columns that the join's condition says are equal, in pairs."""
        pairs = (pair.split("=") for pair in str(self._questions.equalColumns(join)).split())
        return [(int(one), int(other)) for one, other in pairs]

    def traced(self, expression: Expression, plan: Node) -> Expression:
        """The expression with columns replaced by what the plan's Projects make them of: to compare what stands above
        a Project with what stands below it."""
        return self._questions.traced(expression, plan)

    def rdd_partitions(self, leaf: Node) -> int | None:
        """Partitions of a leaf that is an RDD; None for others."""
        found = int(self._questions.partitions(leaf))
        return found if found >= 0 else None

    def is_deterministic(self, node: Node) -> bool:
        """Are the node's own expressions (not its children's) deterministic?"""
        return bool(self._questions.isDeterministic(node))

    def aggregate_functions(self, node: Node) -> set[str]:
        """The class names of the aggregate functions in the node's own expressions: ``{"Count", "Max"}``."""
        return set(self._questions.aggregateFunctions(node).split())

    def problem(self, before: Node, after: Node) -> str | None:
        """Why ``after`` cannot stand for ``before`` (output, resolution, missing input), or None."""
        found: str | None = self._questions.problem(before, after)
        return found

    # Settings and errors

    def settings(self, session: Jvm) -> dict[str, str]:
        """The ``spark.llm.*`` settings of a JVM session, in one round trip."""
        text = session.sessionState().conf().getAllConfs().mkString("\x1f")
        pairs = (pair.split(" -> ", 1) for pair in text.split("\x1f"))
        return {key: value for key, value in pairs if key.startswith("spark.llm.")}

    def exception(self, error: Exception) -> Jvm:
        """``error`` as an exception of the JVM: LlmError as AnalysisException, the JVM's own as they were."""
        from pyspark.errors.exceptions.captured import CapturedException

        if isinstance(error, CapturedException) and error._origin is not None:
            return error._origin
        if getattr(error, "java_exception", None) is not None:
            return error.java_exception  # type: ignore[attr-defined]
        if not isinstance(error, LlmError):
            logger.error("llm() failed in the driver", exc_info=error)
            error = LlmError("LLM_INTERNAL_ERROR", error=repr(error).partition("\\n")[0][:500])
        return self.jvm.org.apache.spark.sql.AnalysisException(error.condition, self.map(error.parameters))


def module(package: Jvm, name: str) -> Jvm:
    """A Scala ``object``."""
    return getattr(getattr(package, f"{name}$"), "MODULE$")


def items(scala_seq: Jvm) -> list[Any]:
    """The elements of a Scala Seq."""
    return [scala_seq.apply(i) for i in range(scala_seq.size())]


def elements(java_list: Jvm) -> list[Any]:
    """The elements of a Java List. A loop over it ends with an exception of the JVM, which takes PySpark longer to
    translate than most rules need for a plan."""
    return [java_list.get(i) for i in range(java_list.size())]


def frame_of(plan: Node, spark: SparkSession, catalyst: Catalyst) -> DataFrame:
    """The rows of a resolved logical plan as a DataFrame of the session."""
    from pyspark.sql import DataFrame

    dataset = module(catalyst.jvm.org.apache.spark.sql.classic, "Dataset").ofRows(spark._jsparkSession, plan)
    return DataFrame(dataset, spark)
