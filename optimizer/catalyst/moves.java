// Questions and small constructions for rules that move calls through a plan (placing.py): what expressions refer to, and
// what they become below a Project.
package sparkllm;

import java.util.ArrayList;
import java.util.HashMap;
import org.apache.spark.sql.catalyst.expressions.Alias;
import org.apache.spark.sql.catalyst.expressions.Attribute;
import org.apache.spark.sql.catalyst.expressions.Expression;
import org.apache.spark.sql.catalyst.expressions.ExpressionSet;
import org.apache.spark.sql.catalyst.expressions.IsNotNull;
import org.apache.spark.sql.catalyst.expressions.NamedExpression;
import org.apache.spark.sql.catalyst.expressions.PlanExpression;
import org.apache.spark.sql.catalyst.expressions.PythonUDF;
import org.apache.spark.sql.catalyst.expressions.ScalarSubquery;
import org.apache.spark.sql.catalyst.plans.logical.Filter;
import org.apache.spark.sql.catalyst.plans.logical.LogicalPlan;
import org.apache.spark.sql.catalyst.plans.logical.Project;
import scala.collection.Iterator;
import scala.collection.immutable.Seq;
import scala.jdk.javaapi.CollectionConverters;

public final class Moves {
  /** The expression ids of the columns that the expressions refer to, each with a space behind it. */
  public String references(Seq expressions) {
    StringBuilder ids = new StringBuilder();
    for (int i = 0; i < expressions.size(); i++) {
      Iterator found = ((Expression) expressions.apply(i)).references().iterator();
      while (found.hasNext()) ids.append(((Attribute) found.next()).exprId().id()).append(' ');
    }
    return ids.toString();
  }

  /** The expression ids of the columns that the plan gives, in their order. */
  public String output(LogicalPlan plan) {
    StringBuilder ids = new StringBuilder();
    Iterator found = plan.output().iterator();
    while (found.hasNext()) ids.append(((Attribute) found.next()).exprId().id()).append(' ');
    return ids.toString();
  }

  /** Are the node's own expressions deterministic, and free of Python and of subqueries but scalar ones that stand for
   * themselves, wherever they stand? */
  public boolean isPlain(LogicalPlan plan) {
    Iterator expressions = plan.expressions().iterator();
    while (expressions.hasNext()) {
      Expression expression = (Expression) expressions.next();
      if (!expression.deterministic() || !isPlain(expression)) return false;
    }
    return true;
  }

  private static boolean isPlain(Expression expression) {
    if (expression instanceof PythonUDF) return false;
    if (expression instanceof PlanExpression) return expression instanceof ScalarSubquery && expression.children().isEmpty();
    Iterator children = expression.children().iterator();
    while (children.hasNext()) {
      if (!isPlain((Expression) children.next())) return false;
    }
    return true;
  }

  /** The expression over the columns below `projects`, the top one first, whose aliases it takes in. */
  public Expression inlined(Expression expression, Seq projects) {
    Expression found = expression;
    for (int i = 0; i < projects.size(); i++) {
      Iterator entries = ((Project) projects.apply(i)).projectList().iterator();
      HashMap made = new HashMap();
      while (entries.hasNext()) {
        Object entry = entries.next();
        if (entry instanceof Alias) made.put(((Alias) entry).exprId(), ((Alias) entry).child());
      }
      found = Trees.replaced(found, made);
    }
    return found;
  }

  /** The expression with `news` instead of the columns `olds`. */
  public Expression renamed(Expression expression, Seq olds, Seq news) {
    HashMap made = new HashMap();
    for (int i = 0; i < olds.size(); i++) made.put(((Attribute) olds.apply(i)).exprId(), news.apply(i));
    return Trees.replaced(expression, made);
  }

  /** `value` as the column that `like` is: the same id, name and metadata. */
  public NamedExpression column(Expression value, Attribute like) {
    if (value instanceof Attribute && ((Attribute) value).exprId().equals(like.exprId())) return (NamedExpression) value;
    return new Alias(value, like.name(), like.exprId(), like.qualifier(), scala.Option.apply(like.metadata()), emptySeq());
  }

  private Seq emptySeq() { return CollectionConverters.asScala(new ArrayList()).toIndexedSeq(); }

  /** Does the plan drop rows by something else than IS NOT NULL? */
  public boolean dropsRows(LogicalPlan plan) {
    if (plan instanceof Filter && !onlyNotNull(((Filter) plan).condition())) return true;
    Iterator children = plan.children().iterator();
    while (children.hasNext()) {
      if (dropsRows((LogicalPlan) children.next())) return true;
    }
    return false;
  }

  private boolean onlyNotNull(Expression condition) {
    if (condition instanceof IsNotNull) return true;
    if (!(condition instanceof org.apache.spark.sql.catalyst.expressions.And)) return false;
    Iterator children = condition.children().iterator();
    while (children.hasNext()) {
      if (!onlyNotNull((Expression) children.next())) return false;
    }
    return true;
  }

  /** Is no row of the plan twice, as far as these columns go and the plan tells? */
  public boolean isUnique(LogicalPlan plan, Seq columns) {
    if (columns.isEmpty()) return false;
    ExpressionSet wanted = org.apache.spark.sql.catalyst.expressions.ExpressionSet$.MODULE$.apply(columns);
    Iterator keys = plan.distinctKeys().iterator();
    while (keys.hasNext()) {
      Iterator key = ((ExpressionSet) keys.next()).iterator();
      boolean isCovered = true;
      while (key.hasNext()) isCovered = isCovered && wanted.contains((Expression) key.next());
      if (isCovered) return true;
    }
    return false;
  }
}
