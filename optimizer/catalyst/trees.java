// What is put into expressions in place of columns: the one walk that all questions share.
package sparkllm;

import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import org.apache.spark.sql.catalyst.expressions.Alias;
import org.apache.spark.sql.catalyst.expressions.Attribute;
import org.apache.spark.sql.catalyst.expressions.Expression;
import org.apache.spark.sql.catalyst.expressions.aggregate.AggregateExpression;
import org.apache.spark.sql.catalyst.plans.logical.LogicalPlan;
import org.apache.spark.sql.catalyst.plans.logical.Project;
import scala.collection.Iterator;
import scala.jdk.javaapi.CollectionConverters;

/** Expressions with others in place of some of theirs. */
public final class Trees {
  private static final int MOST_NODES = 10000; // columns of columns may grow without bound

  /** The expression with other expressions for columns, by expression id, and for aggregate functions, by themselves. */
  public static Expression replaced(Expression expression, Map made) {
    return made.isEmpty() ? expression : replaced(expression, made, null);
  }

  /** The same, again and again in what was put in: what columns are made of in the end. */
  public static Expression traced(Expression expression, Map made) {
    return made.isEmpty() ? expression : replaced(expression, made, new int[] {MOST_NODES});
  }

  /** nodesLeft: null where what is put in stays as it is. */
  private static Expression replaced(Expression expression, Map made, int[] nodesLeft) {
    if (nodesLeft != null && nodesLeft[0]-- <= 0) return expression;
    Object source = null;
    if (expression instanceof Attribute) source = made.get(((Attribute) expression).exprId());
    if (expression instanceof AggregateExpression) source = made.get(expression);
    if (source != null) return nodesLeft == null ? (Expression) source : replaced((Expression) source, made, nodesLeft);
    ArrayList children = new ArrayList();
    boolean isChanged = false;
    Iterator old = expression.children().iterator();
    while (old.hasNext()) {
      Expression child = (Expression) old.next();
      Expression found = replaced(child, made, nodesLeft);
      isChanged = isChanged || found != child;
      children.add(found);
    }
    return isChanged ? (Expression) expression.withNewChildren(seq(children)) : expression;
  }

  /** What a Project makes and does not make at random, by expression id, into `made`. Of other nodes nothing. */
  public static void collectAliases(LogicalPlan plan, Map made) {
    if (!(plan instanceof Project)) return;
    Iterator entries = ((Project) plan).projectList().iterator();
    while (entries.hasNext()) {
      Object entry = entries.next();
      if (entry instanceof Alias && ((Alias) entry).child().deterministic()) {
        made.put(((Alias) entry).exprId(), ((Alias) entry).child());
      }
    }
  }

  /** An immutable Scala Seq of the list's elements. */
  public static scala.collection.immutable.IndexedSeq seq(List values) {
    return CollectionConverters.asScala(values).toIndexedSeq();
  }
}
