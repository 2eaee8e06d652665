// What Spark calls and Python answers: a function builder and an optimizer rule.
package sparkllm;

import java.util.function.UnaryOperator;
import org.apache.spark.sql.catalyst.plans.logical.LogicalPlan;
import org.apache.spark.sql.catalyst.trees.TreeNode;
import org.apache.spark.sql.classic.SparkSession;
import org.apache.spark.unsafe.Platform;

/** Seq of argument expressions to one expression; Python answers with the expression or with what to throw. */
public final class Builder extends scala.runtime.AbstractFunction1 {
  private final UnaryOperator python;

  public Builder(UnaryOperator python) { this.python = python; }

  public Object apply(Object arguments) {
    Object answer = python.apply(new Object[] {SparkSession.active(), arguments});
    if (answer instanceof Throwable) Platform.throwException((Throwable) answer);
    return answer;
  }
}

/** Plan to plan. Python is asked only about plans that hold a call, and can cost a query nothing but time, unless it
 * refuses to run it. is_early: the rule runs before functions are extracted, when calls still stand in expressions. */
public final class Rule extends org.apache.spark.sql.catalyst.rules.Rule {
  private static final org.slf4j.Logger LOG = org.slf4j.LoggerFactory.getLogger("spark_llm.optimizer");
  private final UnaryOperator python;
  private final boolean isEarly;
  private final Plans plans = new Plans();

  public Rule(UnaryOperator python, Boolean isEarly) {
    this.python = python;
    this.isEarly = isEarly.booleanValue();
  }

  public String ruleName() { return isEarly ? "spark_llm.EarlyRules" : "spark_llm.Rules"; }

  public TreeNode apply(TreeNode plan) {
    if (!(isEarly ? plans.holdsOpenCall((LogicalPlan) plan) : plans.holdsCall((LogicalPlan) plan))) return plan;
    Object answer = null;
    try {
      answer = python.apply(new Object[] {SparkSession.active(), plan, Boolean.valueOf(isExplained())});
      if (answer instanceof LogicalPlan) return (LogicalPlan) answer;
      if (!isRefusal(answer)) LOG.warn("The rules of spark-llm failed; the plan stays as it was: " + answer);
    } catch (RuntimeException lostPython) {
      LOG.warn("The rules of spark-llm did not run; the plan stays as it was.", lostPython);
    }
    if (isRefusal(answer)) Platform.throwException((Throwable) answer);
    return plan;
  }

  private static boolean isRefusal(Object answer) {
    return answer instanceof org.apache.spark.sql.AnalysisException
        && !"LLM_INTERNAL_ERROR".equals(((org.apache.spark.sql.AnalysisException) answer).getCondition());
  }

  /** Is the plan wanted only to be shown? Every execution shows its plan, too, but inside SQLExecution. */
  private static boolean isExplained() {
    StackTraceElement[] frames = new Throwable().getStackTrace();
    boolean shown = false;
    for (int i = 0; i < frames.length; i++) {
      if (frames[i].getClassName().contains("ExplainCommand")) return true;
      if (frames[i].getMethodName().startsWith("explainString")) shown = true;
      if (frames[i].getClassName().contains("SQLExecution")) return false;
    }
    return shown;
  }
}

/** What SparkSessionExtensions.injectOptimizerRule wants: a session to a rule. */
public final class RuleBuilder extends scala.runtime.AbstractFunction1 {
  private final Object rule;

  public RuleBuilder(Object rule) { this.rule = rule; }

  public Object apply(Object session) { return rule; }
}
