"""Where ``llm`` and the AI functions are made known to Spark: functions in the registries, rules in the session.

Functions go into the registry of built-in functions, too, from which every new session starts: so ``newSession()``
knows them, and a permanent view may use them (Spark lets views refer to built-in functions only).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from spark_llm.call import CallSpec
from spark_llm.config import LlmConf
from spark_llm.config_routing import LOCAL, ROUTER_KEY
from spark_llm.errors import LlmError
from spark_llm.functions.builder import LlmBuilder
from spark_llm.functions.catalog import Entry, entries
from spark_llm.functions.naming import shown_as_call
from spark_llm.functions.planning import Planner, enabled_rules, jvm_udf
from spark_llm.optimizer.catalyst.bridge import Catalyst, Jvm, Node, items
from spark_llm.optimizer.catalyst.runner import Rule, run_rules
from spark_llm.optimizer.rules import EARLY_RULES, RULES
from spark_llm.vectors import vector_udf

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from spark_llm.report import Reports

# (encoded order tables by digest, number of calls) -> the pandas UDF that answers a group of so many calls; 0: one call
MakeUdf = Callable[[Mapping[str, bytes], int], Any]

logger = logging.getLogger("spark_llm.optimizer")


class Registry:
    """The functions and the rules of one JVM; ``Registry.of(spark)``."""

    _instances: ClassVar[dict[Catalyst, Registry]] = {}

    def __init__(self, catalyst: Catalyst) -> None:
        self._catalyst = catalyst
        self._udfs: dict[str, dict[bool, Jvm]] = {}  # by application, and by whether it gives vectors
        self._makers: dict[str, MakeUdf] = {}
        self._reports: dict[str, Reports] = {}
        self._injected: set[str] = set()
        self.planner = Planner(
            catalyst,
            lambda application, tables, calls: self._makers[application](tables, calls),
            self._tokens_per_second,
        )
        self._build = LlmBuilder(catalyst, self._udf_of)
        self._builders = {entry: catalyst.builder(self._caller(entry)) for entry in entries()}
        self._rule = catalyst.rule(lambda *given: self._optimize(RULES, *given))
        self._early_rule = catalyst.rule(lambda *given: self._optimize(EARLY_RULES, *given), is_early=True)

    @staticmethod
    def of(spark: SparkSession) -> Registry:
        catalyst = Catalyst.of(spark)
        if catalyst not in Registry._instances:
            Registry._instances[catalyst] = Registry(catalyst)
        return Registry._instances[catalyst]

    def install(self, spark: SparkSession) -> None:
        """Make the functions callable in the session and in every later one of its application. Idempotent."""
        application = spark.sparkContext.applicationId
        if application not in self._udfs:
            from spark_llm import report, udf

            reports = self._reports[application] = report.install(spark)
            self._use(application, lambda tables, calls: udf.make_udf(reports, tables, calls))
        if application not in self._injected:
            # Sessions share their extensions, from which Spark makes its optimizer anew for every query.
            self._injected.add(application)
            spark._jsparkSession.extensions().injectOptimizerRule(self._catalyst.rule_builder(self._early_rule))
        session = spark._jsparkSession
        builtin = self._catalyst.jvm.org.apache.spark.sql.catalyst.analysis.FunctionRegistry.builtin()
        for functions in (builtin, session.sessionState().functionRegistry()):
            self._register(functions)
        self._add_rule(session)

    @contextlib.contextmanager
    def using(self, spark: SparkSession, make: MakeUdf) -> Iterator[None]:
        """For tests: let the calls of the session's application run the pandas UDFs that ``make`` makes."""
        application = spark.sparkContext.applicationId
        before = self._makers.get(application)
        self._use(application, make)
        try:
            yield
        finally:
            if before is None:
                del self._udfs[application], self._makers[application]
            else:
                self._use(application, before)

    def udf_for(self, spark: SparkSession, spec: CallSpec) -> Any:
        """The pandas UDF that answers a call with this spec: (spec as JSON, prompt, fields ...) STRING -> STRING."""
        digest = spec.prompt.table if spec.prompt is not None else None
        tables = {} if digest is None else {digest: self.planner.tables[digest]}
        return self._makers[spark.sparkContext.applicationId](tables, 0)

    def _use(self, application: str, make: MakeUdf) -> None:
        self._makers[application] = make
        texts = make({}, 0)
        self._udfs[application] = {False: jvm_udf(texts), True: jvm_udf(vector_udf(texts))}
        self.planner.forget_functions()

    def _tokens_per_second(self, application: str) -> float | None:
        reports = self._reports.get(application)
        return None if reports is None else reports.tokens_per_second()

    def _udf_of(self, session: Jvm, is_vector: bool) -> Jvm:
        application = session.sparkContext().applicationId()
        self._coordinate(application, session)
        udfs = self._udfs.get(application)
        if udfs is None:
            raise LlmError("LLM_NOT_ENABLED")
        return udfs[is_vector]

    def _coordinate(self, application: str, session: Jvm) -> None:
        """Where the session's calls may go to engines of other executors, let the UDF know who knows these."""
        reports = self._reports.get(application)
        if reports is None or reports.sink.cluster is not None or session.conf().get(ROUTER_KEY, LOCAL) == LOCAL:
            return
        conf = LlmConf.parse(self._catalyst.settings(session))
        if conf.router != LOCAL:
            reports.coordinate(conf)
            self._use(application, self._makers[application])

    def _register(self, functions: Jvm) -> None:
        last = self._identifier(next(reversed(self._builders)).name)
        known = functions.lookupFunctionBuilder(last)
        if known.isDefined() and known.get().equals(next(reversed(self._builders.values()))):
            return
        for entry, builder in self._builders.items():
            info = self._catalyst.expressions.ExpressionInfo(
                "spark_llm.functions",
                None,
                entry.name,
                entry.usage,
                entry.arguments,
                entry.examples,
                "",
                "misc_funcs",
                "0.1.0",
                "",
                "built-in",
            )
            functions.registerFunction(self._identifier(entry.name), info, builder)

    def _identifier(self, name: str) -> Jvm:
        """The name as this Spark names its built-in functions: bare, or in system.builtin (4.3)."""
        catalyst = self._catalyst.jvm.org.apache.spark.sql.catalyst
        other = catalyst.analysis.FunctionRegistry.builtin().listFunction().head()
        return catalyst.FunctionIdentifier(name, other.database(), other.catalog())

    def _caller(self, entry: Entry) -> Callable[[Jvm, Jvm], Jvm]:
        def call(session: Jvm, arguments: Jvm) -> Jvm:
            # A session made by newSession() gets its functions from Spark, but its rules from nobody.
            self._add_rule(session)
            given = items(arguments)
            return shown_as_call(entry.name, given, entry.build(self._build, session, given), self._catalyst)

        return call

    def _add_rule(self, session: Jvm) -> None:
        methods = session.experimental()
        rules = methods.extraOptimizations()
        if not rules.contains(self._rule):
            getattr(methods, "extraOptimizations_$eq")(rules.appended(self._rule))

    def _optimize(self, rules: Sequence[Rule], session: Jvm, plan: Node, explaining: bool) -> Node:
        try:
            conf = LlmConf.parse(self._catalyst.settings(session))
        except LlmError as error:  # set after the query was analysed; the next analysis fails with it
            logger.warning("No rule runs: %s", error)
            return plan
        return run_rules(plan, rules, enabled_rules(conf), self.planner.context(session, conf, explaining))
