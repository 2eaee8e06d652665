// Joins whose condition holds a call over both sides (rules/semantic_join.py), found and put back.
package sparkllm;

import java.util.ArrayList;
import java.util.HashMap;
import java.util.Map;
import org.apache.spark.sql.catalyst.expressions.And;
import org.apache.spark.sql.catalyst.expressions.Attribute;
import org.apache.spark.sql.catalyst.expressions.Expression;
import org.apache.spark.sql.catalyst.expressions.Literal;
import org.apache.spark.sql.catalyst.expressions.PythonUDF;
import org.apache.spark.sql.catalyst.expressions.SubqueryExpression;
import org.apache.spark.sql.catalyst.optimizer.RewritePredicateSubquery;
import org.apache.spark.sql.catalyst.plans.Cross$;
import org.apache.spark.sql.catalyst.plans.Inner$;
import org.apache.spark.sql.catalyst.plans.logical.Join;
import org.apache.spark.sql.catalyst.plans.logical.LogicalPlan;
import org.apache.spark.sql.catalyst.trees.TreePattern;
import org.apache.spark.sql.types.DataTypes;
import scala.collection.Iterator;
import scala.jdk.javaapi.CollectionConverters;

/** Questions about joins. */
public final class Pairs {
  /** The plan with EXISTS and IN whose condition holds a call made joins of, as Spark would do too late for us. */
  public LogicalPlan withoutSubqueries(LogicalPlan plan) {
    if (!plan.containsPattern(TreePattern.PYTHON_UDF()) || !plan.containsPattern(TreePattern.PLAN_EXPRESSION())) return plan;
    ArrayList children = list(plan.children());
    boolean isChanged = false;
    for (int i = 0; i < children.size(); i++) {
      Object child = children.get(i);
      children.set(i, withoutSubqueries((LogicalPlan) child));
      isChanged = isChanged || children.get(i) != child;
    }
    if (isChanged) plan = (LogicalPlan) plan.withNewChildren(seq(children));
    Iterator expressions = plan.expressions().iterator();
    while (expressions.hasNext()) {
      if (joinsOnCall((Expression) expressions.next())) return RewritePredicateSubquery.apply(plan);
    }
    return plan;
  }

  private boolean joinsOnCall(Expression expression) {
    if (!expression.containsPattern(TreePattern.PLAN_EXPRESSION())) return false;
    if (expression instanceof SubqueryExpression) {
      Iterator conditions = expression.children().iterator();
      while (conditions.hasNext()) {
        if (holdsCall((Expression) conditions.next())) return true;
      }
    }
    Iterator children = expression.children().iterator();
    while (children.hasNext()) {
      if (joinsOnCall((Expression) children.next())) return true;
    }
    return false;
  }

  private boolean holdsCall(Expression expression) {
    if (!expression.containsPattern(TreePattern.PYTHON_UDF())) return false;
    if (expression instanceof PythonUDF && "llm".equals(((PythonUDF) expression).name())) return true;
    Iterator children = expression.children().iterator();
    while (children.hasNext()) {
      if (holdsCall((Expression) children.next())) return true;
    }
    return false;
  }

  /** A join on a call that Spark would refuse, one without such a join below it: {join, its condition without the
   * conjuncts with such calls or null, those}. null: there is none. */
  public Object[] find(LogicalPlan plan) {
    if (!plan.containsPattern(TreePattern.PYTHON_UDF())) return null;
    Iterator children = plan.children().iterator();
    while (children.hasNext()) {
      Object[] found = find((LogicalPlan) children.next());
      if (found != null) return found;
    }
    if (!(plan instanceof Join)) return null;
    Join join = (Join) plan;
    if (join.condition().isEmpty() || join.joinType() == Inner$.MODULE$ || join.joinType() instanceof Cross$) return null;
    ArrayList conjuncts = OperatorCalls.operands((Expression) join.condition().get(), true);
    Expression cheap = null;
    Expression dear = null;
    boolean isOurs = false;
    for (int i = 0; i < conjuncts.size(); i++) {
      Expression conjunct = (Expression) conjuncts.get(i);
      if (spansBoth(conjunct, join)) {
        isOurs = isOurs || holdsCall(conjunct);
        dear = dear == null ? conjunct : new And(dear, conjunct);
      } else {
        cheap = cheap == null ? conjunct : new And(cheap, conjunct);
      }
    }
    return isOurs ? new Object[] {join, cheap, dear} : null;
  }

  /** Does a Python function in the expression need both sides of the join? */
  private boolean spansBoth(Expression expression, Join join) {
    if (!expression.containsPattern(TreePattern.PYTHON_UDF())) return false;
    if (expression instanceof PythonUDF && !expression.references().subsetOf(join.left().outputSet())
        && !expression.references().subsetOf(join.right().outputSet())) return true;
    Iterator children = expression.children().iterator();
    while (children.hasNext()) {
      if (spansBoth((Expression) children.next(), join)) return true;
    }
    return false;
  }

  /** The plan with one node, this very object, replaced. */
  public LogicalPlan replaced(LogicalPlan plan, LogicalPlan old, LogicalPlan made) {
    if (plan == old) return made;
    ArrayList children = list(plan.children());
    for (int i = 0; i < children.size(); i++) {
      LogicalPlan child = (LogicalPlan) children.get(i);
      LogicalPlan found = replaced(child, old, made);
      if (found != child) {
        children.set(i, found);
        return (LogicalPlan) plan.withNewChildren(seq(children));
      }
    }
    return plan;
  }

  /** The expression with some columns replaced by others. */
  public Expression renamed(Expression expression, ArrayList old, ArrayList made) {
    Map names = new HashMap();
    for (int i = 0; i < old.size(); i++) names.put(((Attribute) old.get(i)).exprId(), made.get(i));
    return renamed(expression, names);
  }

  private Expression renamed(Expression expression, Map names) {
    if (expression instanceof Attribute) {
      Object made = names.get(((Attribute) expression).exprId());
      return made == null ? expression : (Expression) made;
    }
    ArrayList children = list(expression.children());
    boolean isChanged = false;
    for (int i = 0; i < children.size(); i++) {
      Object child = children.get(i);
      children.set(i, renamed((Expression) child, names));
      isChanged = isChanged || children.get(i) != child;
    }
    return isChanged ? (Expression) expression.withNewChildren(seq(children)) : expression;
  }

  public Expression isTrue(boolean value) { return Literal.create(Boolean.valueOf(value), DataTypes.BooleanType); }

  private static ArrayList list(scala.collection.Iterable values) { return OperatorCalls.list(values); }

  private static scala.collection.immutable.IndexedSeq seq(ArrayList values) { return OperatorCalls.seq(values); }
}
