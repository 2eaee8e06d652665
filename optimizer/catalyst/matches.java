// Joins of which one pair of each left row is enough (rules/first_match.py), found by what rules/outer_pairs.py builds.
package sparkllm;

import java.util.ArrayList;
import java.util.HashMap;
import org.apache.spark.sql.catalyst.expressions.Alias;
import org.apache.spark.sql.catalyst.expressions.Attribute;
import org.apache.spark.sql.catalyst.expressions.Coalesce;
import org.apache.spark.sql.catalyst.expressions.EqualNullSafe;
import org.apache.spark.sql.catalyst.expressions.EqualTo;
import org.apache.spark.sql.catalyst.expressions.Expression;
import org.apache.spark.sql.catalyst.expressions.If;
import org.apache.spark.sql.catalyst.expressions.Literal;
import org.apache.spark.sql.catalyst.expressions.RowNumber;
import org.apache.spark.sql.catalyst.expressions.SortOrder;
import org.apache.spark.sql.catalyst.expressions.WindowExpression;
import org.apache.spark.sql.catalyst.plans.logical.Filter;
import org.apache.spark.sql.catalyst.plans.logical.LogicalPlan;
import org.apache.spark.sql.catalyst.plans.logical.Project;
import org.apache.spark.sql.catalyst.plans.logical.Window;
import org.apache.spark.sql.catalyst.plans.logical.WindowGroupLimit;
import org.apache.spark.sql.catalyst.trees.TreePattern;
import scala.collection.Iterator;

/** Questions about filters that keep one pair of each left row. */
public final class Matches {
  private final Plans calls = new Plans();

  /** Does the plan hold such a filter? */
  public boolean isAnyIn(LogicalPlan plan) {
    if (!plan.containsPattern(TreePattern.EVAL_PYTHON_UDF()) || !plan.containsPattern(TreePattern.WINDOW_EXPRESSION())) {
      return false;
    }
    if (of(plan) != null) return true;
    Iterator children = plan.children().iterator();
    while (children.hasNext()) {
      if (isAnyIn((LogicalPlan) children.next())) return true;
    }
    return false;
  }

  /** If the plan's root is such a filter: {the node that the window over the pairs stands on, the node below whose calls
   * judge the pairs, the column there with the id of a pair's left row, what makes a pair a match, in terms of that node,
   * or null if the filters between are all}. Else null. */
  public Object[] of(LogicalPlan plan) {
    if (!(plan instanceof Filter) || !(((Filter) plan).child() instanceof Window)) return null;
    Window window = (Window) ((Filter) plan).child();
    if (window.partitionSpec().size() != 1 || window.orderSpec().size() != 1 || window.windowExpressions().size() != 1) {
      return null;
    }
    Object row = window.partitionSpec().head();
    Object number = window.windowExpressions().head();
    if (!isColumn(row, "row_id") || !(number instanceof Alias) || !isFirst((Filter) plan, (Alias) number)) return null;
    LogicalPlan top = window.child();
    if (top instanceof WindowGroupLimit) top = ((WindowGroupLimit) top).child();
    HashMap made = new HashMap();
    LogicalPlan bottom = top;
    while ((bottom instanceof Project || bottom instanceof Filter) && calls.isDeterministic(bottom)) {
      Trees.collectAliases(bottom, made);
      bottom = (LogicalPlan) bottom.children().head();
    }
    if (!calls.isCall(bottom)) return null;
    if (!((LogicalPlan) bottom.children().head()).outputSet().contains((Attribute) row)) return null;
    Expression order = ((SortOrder) window.orderSpec().head()).child();
    if (order.semanticEquals((Expression) row)) return new Object[] {top, bottom, row, null};
    return isColumn(order, "is_ok") ? new Object[] {top, bottom, row, condition(Trees.traced(order, made))} : null;
  }

  private static boolean isColumn(Object expression, String name) {
    return expression instanceof Attribute && name.equals(((Attribute) expression).name());
  }

  /** Does the filter keep the rows with number 1 only, where the number is that of a pair? */
  private static boolean isFirst(Filter filter, Alias number) {
    if (!"pair_number".equals(number.name()) || !(number.child() instanceof WindowExpression)) return false;
    if (!(((WindowExpression) number.child()).windowFunction() instanceof RowNumber)) return false;
    ArrayList conjuncts = Exprs.operands(filter.condition(), true);
    for (int i = 0; i < conjuncts.size(); i++) {
      if (!(conjuncts.get(i) instanceof EqualTo)) continue;
      EqualTo equality = (EqualTo) conjuncts.get(i);
      boolean isSwapped = equality.left() instanceof Literal;
      Expression column = isSwapped ? equality.right() : equality.left();
      Expression value = isSwapped ? equality.left() : equality.right();
      if (column.semanticEquals(number.toAttribute()) && isValue(value, Integer.valueOf(1))) return true;
    }
    return false;
  }

  private static boolean isValue(Expression expression, Object value) {
    return expression instanceof Literal && value.equals(((Literal) expression).value());
  }

  /** The condition of which the expression says whether it is true. */
  private static Expression condition(Expression expression) {
    if (expression instanceof EqualNullSafe && isValue(((EqualNullSafe) expression).right(), Boolean.TRUE)) {
      return condition(((EqualNullSafe) expression).left());
    }
    if (expression instanceof If && isValue(((If) expression).trueValue(), Boolean.TRUE)
        && isValue(((If) expression).falseValue(), Boolean.FALSE)) {
      return condition(((If) expression).predicate());
    }
    if (expression instanceof Coalesce && expression.children().size() == 2
        && isValue((Expression) expression.children().apply(1), Boolean.FALSE)) {
      return condition((Expression) expression.children().head());
    }
    return expression;
  }

  /** Does the expression hold in each row for which the mask holds? */
  public boolean isImplied(Expression expression, Expression mask) {
    ArrayList conjuncts = Exprs.operands(mask, true);
    for (int i = 0; i < conjuncts.size(); i++) {
      if (condition((Expression) conjuncts.get(i)).semanticEquals(condition(expression))) return true;
    }
    return false;
  }
}
