// Aggregates over answers (rules/llm_aggregates.py): where they stand in a plan, and plans written as SQL over a plan.
package sparkllm;

import java.util.ArrayList;
import java.util.HashMap;
import org.apache.spark.sql.catalyst.QueryPlanningTracker;
import org.apache.spark.sql.catalyst.analysis.EliminateSubqueryAliases;
import org.apache.spark.sql.catalyst.analysis.UnresolvedRelation;
import org.apache.spark.sql.catalyst.expressions.Attribute;
import org.apache.spark.sql.catalyst.expressions.Expression;
import org.apache.spark.sql.catalyst.expressions.PythonUDF;
import org.apache.spark.sql.catalyst.expressions.aggregate.AggregateExpression;
import org.apache.spark.sql.catalyst.optimizer.ReplaceExpressions;
import org.apache.spark.sql.catalyst.plans.logical.Aggregate;
import org.apache.spark.sql.catalyst.plans.logical.LocalRelation;
import org.apache.spark.sql.catalyst.plans.logical.LogicalPlan;
import org.apache.spark.sql.catalyst.trees.TreePattern;
import org.apache.spark.sql.classic.SparkSession;
import scala.Option;
import scala.collection.Iterator;
import scala.collection.immutable.Seq;

public final class LlmAggregates {
  private static final String INPUT = "llm_aggregate"; // as spark_llm.aggregate names it

  public static boolean isInput(Expression expression) {
    return expression instanceof PythonUDF && INPUT.equals(((PythonUDF) expression).name());
  }

  /** Does the plan hold an aggregate over answers? */
  public boolean holds(LogicalPlan plan) {
    if (!plan.containsPattern(TreePattern.PYTHON_UDF())) return false;
    if (holdsItself(plan)) return true;
    Iterator children = plan.children().iterator();
    while (children.hasNext()) {
      if (holds((LogicalPlan) children.next())) return true;
    }
    return false;
  }

  /** Is this very node an Aggregate with one? */
  public boolean isOne(LogicalPlan plan) { return plan instanceof Aggregate && holdsItself(plan); }

  private boolean holdsItself(LogicalPlan plan) {
    Iterator expressions = plan.expressions().iterator();
    while (expressions.hasNext()) {
      if (holds((Expression) expressions.next())) return true;
    }
    return false;
  }

  public boolean holds(Expression expression) {
    if (!expression.containsPattern(TreePattern.PYTHON_UDF())) return false;
    if (isInput(expression)) return true;
    Iterator children = expression.children().iterator();
    while (children.hasNext()) {
      if (holds((Expression) children.next())) return true;
    }
    return false;
  }

  /** What the aggregate expression has for its input, if that is a PythonUDF (spec, text) of ours, else null. */
  public Expression input(Expression aggregate) {
    Expression first = (Expression) ((AggregateExpression) aggregate).aggregateFunction().children().head();
    return isInput(first) ? first : null;
  }

  /** The results with these attributes in place of those with the same ids, whose names are long. */
  public Seq renamed(Seq results, Seq attributes) {
    HashMap made = new HashMap();
    for (int i = 0; i < attributes.size(); i++) made.put(((Attribute) attributes.apply(i)).exprId(), attributes.apply(i));
    ArrayList found = new ArrayList();
    for (int i = 0; i < results.size(); i++) found.add(Trees.replaced((Expression) results.apply(i), made));
    return Trees.seq(found);
  }

  /** The resolved plan of a query over the one table `input`, whose columns are called as `columns`, its attributes. */
  public LogicalPlan planned(SparkSession session, String sql, LogicalPlan input, Seq columns) throws Exception {
    LogicalPlan leaf = new LocalRelation(columns, Trees.seq(new ArrayList()), false, Option.empty());
    LogicalPlan parsed = replaced((LogicalPlan) session.sessionState().sqlParser().parsePlan(sql), null, leaf);
    LogicalPlan plan = session.sessionState().analyzer().executeAndCheck(parsed, new QueryPlanningTracker(Option.empty()));
    plan = ReplaceExpressions.apply(EliminateSubqueryAliases.apply(plan)); // the optimizer is past these
    return replaced(plan, leaf, input);
  }

  /** old: null is whatever table the query names. */
  private LogicalPlan replaced(LogicalPlan plan, LogicalPlan old, LogicalPlan found) {
    if (old == null ? plan instanceof UnresolvedRelation : plan.equals(old)) return found;
    ArrayList children = new ArrayList();
    Iterator before = plan.children().iterator();
    while (before.hasNext()) children.add(replaced((LogicalPlan) before.next(), old, found));
    return (LogicalPlan) plan.withNewChildren(Trees.seq(children));
  }
}
