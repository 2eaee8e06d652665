// The JVM half of the bridge (bridge.py compiles it with Spark's own Janino: raw types, no lambdas).
// What it is: a function builder and an optimizer rule that ask Python, and the plan questions that would
// take hundreds of round trips from there.
package sparkllm;

import java.util.function.UnaryOperator;
import org.apache.spark.sql.catalyst.expressions.Expression;
import org.apache.spark.sql.catalyst.expressions.PythonUDF;
import org.apache.spark.sql.catalyst.expressions.aggregate.AggregateFunction;
import org.apache.spark.sql.catalyst.plans.logical.ArrowEvalPython;
import org.apache.spark.sql.catalyst.plans.logical.LogicalPlan;
import org.apache.spark.sql.catalyst.trees.TreeNode;
import org.apache.spark.sql.catalyst.trees.TreePattern;
import org.apache.spark.sql.classic.SparkSession;
import org.apache.spark.unsafe.Platform;
import scala.collection.Iterator;

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

/** Plan to plan. Python is asked only about plans that hold a call, and can cost a query nothing but time. */
public final class Rule extends org.apache.spark.sql.catalyst.rules.Rule {
  private static final org.slf4j.Logger LOG = org.slf4j.LoggerFactory.getLogger("spark_llm.optimizer");
  private final UnaryOperator python;
  private final Plans plans = new Plans();

  public Rule(UnaryOperator python) { this.python = python; }

  public TreeNode apply(TreeNode plan) {
    if (!plans.holdsCall((LogicalPlan) plan)) return plan;
    try {
      Object answer = python.apply(new Object[] {SparkSession.active(), plan});
      if (answer instanceof LogicalPlan) return (LogicalPlan) answer;
      LOG.warn("The rules of spark-llm failed; the plan stays as it was: " + answer);
    } catch (RuntimeException lostPython) {
      LOG.warn("The rules of spark-llm did not run; the plan stays as it was.", lostPython);
    }
    return plan;
  }
}

/** Questions about logical plans. */
public final class Plans {
  public boolean holdsCall(LogicalPlan plan) {
    if (!plan.containsPattern(TreePattern.EVAL_PYTHON_UDF())) return false;
    if (isCall(plan)) return true;
    Iterator children = plan.children().iterator();
    while (children.hasNext()) {
      if (holdsCall((LogicalPlan) children.next())) return true;
    }
    return false;
  }

  /** Is this node an ArrowEvalPython of llm() calls? */
  public boolean isCall(LogicalPlan plan) {
    if (!(plan instanceof ArrowEvalPython)) return false;
    Iterator udfs = ((ArrowEvalPython) plan).udfs().iterator();
    while (udfs.hasNext()) {
      if (!"llm".equals(((PythonUDF) udfs.next()).name())) return false;
    }
    return true;
  }

  /** Are the node's own expressions deterministic, whatever its children are? */
  public boolean isDeterministic(LogicalPlan plan) {
    Iterator expressions = plan.expressions().iterator();
    while (expressions.hasNext()) {
      if (!((Expression) expressions.next()).deterministic()) return false;
    }
    return true;
  }

  /** The class names of the aggregate functions in the node's own expressions, each with a space behind it. */
  public String aggregateFunctions(LogicalPlan plan) {
    StringBuilder names = new StringBuilder();
    Iterator expressions = plan.expressions().iterator();
    while (expressions.hasNext()) aggregateFunctions((Expression) expressions.next(), names);
    return names.toString();
  }

  private void aggregateFunctions(Expression expression, StringBuilder names) {
    if (expression instanceof AggregateFunction) names.append(expression.getClass().getSimpleName()).append(' ');
    Iterator children = expression.children().iterator();
    while (children.hasNext()) aggregateFunctions((Expression) children.next(), names);
  }

  /** Why `after` cannot stand for `before`, or null: a wrong plan rarely throws. */
  public String problem(LogicalPlan before, LogicalPlan after) {
    if (!before.output().equals(after.output())) {
      return "the output changes from " + before.output() + " to " + after.output();
    }
    if (!after.resolved()) return "the plan is not resolved";
    return missing(after);
  }

  private String missing(LogicalPlan plan) {
    if (!plan.missingInput().isEmpty()) return plan.nodeName() + " misses the input " + plan.missingInput();
    Iterator children = plan.children().iterator();
    while (children.hasNext()) {
      String found = missing((LogicalPlan) children.next());
      if (found != null) return found;
    }
    return null;
  }
}
