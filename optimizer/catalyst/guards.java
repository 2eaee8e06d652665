// Which rows need the value of a call: computed from what stands around it in its operator's expressions, and written
// into it as its mask. rules/mask_conditional_calls.py says how.
package sparkllm;

import java.util.ArrayList;
import java.util.HashMap;
import java.util.LinkedHashMap;
import java.util.Map;
import java.util.Set;
import org.apache.spark.sql.catalyst.expressions.And;
import org.apache.spark.sql.catalyst.expressions.CaseWhen;
import org.apache.spark.sql.catalyst.expressions.Coalesce;
import org.apache.spark.sql.catalyst.expressions.EqualTo;
import org.apache.spark.sql.catalyst.expressions.Expression;
import org.apache.spark.sql.catalyst.expressions.If;
import org.apache.spark.sql.catalyst.expressions.In;
import org.apache.spark.sql.catalyst.expressions.IsNotNull;
import org.apache.spark.sql.catalyst.expressions.IsNull;
import org.apache.spark.sql.catalyst.expressions.Literal;
import org.apache.spark.sql.catalyst.expressions.Not;
import org.apache.spark.sql.catalyst.expressions.Or;
import org.apache.spark.sql.catalyst.expressions.PythonUDF;
import org.apache.spark.sql.catalyst.expressions.ScalarSubquery;
import org.apache.spark.sql.catalyst.expressions.SubqueryExpression;
import org.apache.spark.sql.catalyst.expressions.WindowExpression;
import org.apache.spark.sql.catalyst.expressions.aggregate.AggregateExpression;
import org.apache.spark.sql.catalyst.trees.TreePattern;
import org.apache.spark.sql.types.DataTypes;
import scala.collection.Iterator;

/** A call of one operator, with the conditions under which its places there need its value. */
final class CallPlaces {
  final PythonUDF udf;
  final ArrayList guards = new ArrayList(); // a list of conditions for each place, in the order of their evaluation
  String refusal; // why it is left alone
  boolean isOpen; // its result is being made
  Expression result;

  CallPlaces(PythonUDF udf) { this.udf = udf; }
}

/** The calls of one operator. They are told apart by scope: what an Aggregate computes of its input's rows can say
 * nothing about what it computes of its groups. */
public final class OperatorCalls {
  static final int MOST_NODES = 500; // of a condition that holds calls: they may stand in each other's masks
  public final Map known = new HashMap(); // scope -> canonical call -> CallPlaces
  public ArrayList prefix = new ArrayList(); // what holds before the filter's conjunct at hand is evaluated
  private final Map specs;
  private final Set made;
  private final ArrayList notes;

  public OperatorCalls(Map specs, Set made, ArrayList notes) {
    this.specs = specs;
    this.made = made;
    this.notes = notes;
  }

  // Where a call's value is needed

  /** guard: conditions under which the value is needed; none: always. onlyTrue: NULL is as good as FALSE there. */
  public void see(Expression expression, ArrayList guard, boolean onlyTrue, int scope) {
    if (!expression.containsPattern(TreePattern.PYTHON_UDF())) return;
    if (expression instanceof If) {
      If choice = (If) expression;
      see(choice.predicate(), guard, true, scope);
      see(choice.trueValue(), and(guard, Exprs.isTrue(choice.predicate())), onlyTrue, scope);
      see(choice.falseValue(), and(guard, new Not(Exprs.isTrue(choice.predicate()))), onlyTrue, scope);
    } else if (expression instanceof CaseWhen) {
      ArrayList open = guard;
      ArrayList children = Exprs.list(expression.children());
      for (int i = 0; i + 1 < children.size(); i += 2) {
        Expression condition = (Expression) children.get(i);
        see(condition, open, true, scope);
        see((Expression) children.get(i + 1), and(open, Exprs.isTrue(condition)), onlyTrue, scope);
        open = and(open, new Not(Exprs.isTrue(condition)));
      }
      if (children.size() % 2 == 1) see((Expression) children.get(children.size() - 1), open, onlyTrue, scope);
    } else if (expression instanceof Coalesce) {
      ArrayList open = guard;
      Iterator children = expression.children().iterator();
      while (children.hasNext()) {
        Expression child = (Expression) children.next();
        see(child, open, false, scope);
        open = and(open, new IsNull(child));
      }
    } else if (expression instanceof And || expression instanceof Or) {
      seeJunction(Exprs.operands(expression, expression instanceof And), expression instanceof And, guard, onlyTrue, scope);
    } else if (expression instanceof In) {
      seeIn((In) expression, guard, scope);
    } else if (expression instanceof AggregateExpression) {
      // It is computed of the input's rows, whatever is made of it.
      AggregateExpression aggregate = (AggregateExpression) expression;
      ArrayList rows = new ArrayList();
      if (aggregate.filter().isDefined()) {
        Expression filter = (Expression) aggregate.filter().get();
        see(filter, rows, true, 0);
        rows = and(rows, Exprs.isTrue(filter));
      }
      see(aggregate.aggregateFunction(), rows, false, 0);
    } else if (expression instanceof WindowExpression) {
      seeAll(Exprs.list(expression.children()), new ArrayList(), 0);
    } else if (Exprs.isCall(expression)) {
      PythonUDF udf = (PythonUDF) expression;
      if (Exprs.isOpen(udf)) places(udf, scope).guards.add(guard);
      ArrayList children = Exprs.list(udf.children());
      seeAll(new ArrayList(children.subList(1, children.size())), guard, scope);
    } else {
      seeAll(Exprs.list(expression.children()), guard, scope);
    }
  }

  private void seeAll(ArrayList expressions, ArrayList guard, int scope) {
    for (int i = 0; i < expressions.size(); i++) see((Expression) expressions.get(i), guard, false, scope);
  }

  /** The operands of AND or OR: Spark evaluates them from the left until one decides. What holds no call and cannot fail
   * is asked first, wherever it stands. */
  private void seeJunction(ArrayList operands, boolean isAnd, ArrayList guard, boolean onlyTrue, int scope) {
    for (int i = 0; i < operands.size(); i++) {
      Expression operand = (Expression) operands.get(i);
      if (!operand.containsPattern(TreePattern.PYTHON_UDF())) continue;
      ArrayList needed = guard;
      for (int pass = 0; pass < 2; pass++) {
        for (int j = 0; j < operands.size(); j++) {
          Expression other = (Expression) operands.get(j);
          boolean isCheap = !other.containsPattern(TreePattern.PYTHON_UDF()) && other.deterministic() && Exprs.isSafe(other);
          if (j == i || isCheap != (pass == 0) || (!isCheap && j > i)) continue;
          needed = and(needed, isAnd ? (onlyTrue ? Exprs.isTrue(other) : Exprs.isNotFalse(other)) : new Not(Exprs.isTrue(other)));
        }
      }
      see(operand, needed, onlyTrue, scope);
    }
  }

  /** Of {@code value IN (items)} an item is needed where the value is not NULL and no item before it is equal. */
  private void seeIn(In in, ArrayList guard, int scope) {
    ArrayList items = Exprs.list(in.list());
    see(in.value(), guard, false, scope);
    for (int i = 0; i < items.size(); i++) {
      ArrayList needed = and(guard, new IsNotNull(in.value()));
      for (int pass = 0; pass < 2; pass++) {
        for (int j = 0; j < items.size(); j++) {
          Expression other = (Expression) items.get(j);
          boolean isCheap = !other.containsPattern(TreePattern.PYTHON_UDF()) && other.deterministic() && Exprs.isSafe(other);
          if (j == i || isCheap != (pass == 0) || (!isCheap && j > i)) continue;
          needed = and(needed, new Not(Exprs.isTrue(new EqualTo(in.value(), other))));
        }
      }
      see((Expression) items.get(i), needed, false, scope);
    }
  }

  private ArrayList and(ArrayList guard, Expression condition) {
    ArrayList longer = new ArrayList(guard.isEmpty() ? prefix : guard);
    longer.add(condition);
    return longer;
  }

  private CallPlaces places(PythonUDF udf, int scope) {
    Object number = Integer.valueOf(scope);
    if (!known.containsKey(number)) known.put(number, new LinkedHashMap());
    Map calls = (Map) known.get(number);
    Object key = udf.canonicalized();
    if (!calls.containsKey(key)) calls.put(key, new CallPlaces(udf));
    return (CallPlaces) calls.get(key);
  }

  // What becomes of the calls

  public Expression rewrite(Expression expression, int scope) {
    if (!expression.containsPattern(TreePattern.PYTHON_UDF())) return expression;
    if (expression instanceof AggregateExpression || expression instanceof WindowExpression) scope = 0;
    if (Exprs.isCall(expression) && Exprs.isOpen((PythonUDF) expression)) return result(places((PythonUDF) expression, scope), scope);
    ArrayList children = Exprs.list(expression.children());
    boolean isChanged = false;
    for (int i = 0; i < children.size(); i++) {
      Expression child = (Expression) children.get(i);
      Expression found = rewrite(child, scope);
      isChanged = isChanged || found != child;
      children.set(i, found);
    }
    return isChanged ? (Expression) expression.withNewChildren(Exprs.seq(children)) : expression;
  }

  private Expression result(CallPlaces places, int scope) {
    if (places.result != null) return places.result;
    places.isOpen = true;
    Expression mask = mask(places, scope);
    places.isOpen = false;
    PythonUDF udf = places.udf;
    ArrayList old = Exprs.list(udf.children());
    ArrayList children = new ArrayList();
    boolean isChanged = mask != null;
    for (int i = 0; i < old.size(); i++) {
      Expression child = (Expression) old.get(i);
      Expression found = rewrite(child, scope);
      if (mask != null && !Exprs.isSafe(child)) found = new If(mask, found, Literal.create(null, DataTypes.StringType));
      isChanged = isChanged || found != child;
      children.add(found);
    }
    if (mask != null) {
      children.set(0, spec(udf));
      children.add(mask);
      note(true, udf, mask.sql());
    } else if (places.refusal != null) {
      note(false, udf, places.refusal);
    }
    places.result = !isChanged ? udf : new PythonUDF(
        udf.name(), udf.func(), udf.dataType(), Exprs.seq(children), udf.evalType(), udf.udfDeterministic(), udf.resultId());
    return places.result;
  }

  private Expression spec(PythonUDF udf) {
    String text = ((Literal) udf.children().apply(0)).value().toString();
    made.add(text);
    Object masked = specs.get(text);
    return masked == null ? (Expression) udf.children().apply(0) : (Expression) masked;
  }

  private void note(boolean isMasked, PythonUDF udf, String why) {
    Expression prompt = (Expression) udf.children().apply(1);
    String text = prompt instanceof Literal && ((Literal) prompt).value() != null
        ? ((Literal) prompt).value().toString() : "";
    notes.add(new String[] {isMasked ? "1" : "", text, why});
  }

  /** The call's mask, or null for none: one of its places always needs it, or none that may stand for the conditions. */
  private Expression mask(CallPlaces places, int scope) {
    Expression any = null;
    for (int i = 0; i < places.guards.size(); i++) {
      ArrayList guard = (ArrayList) places.guards.get(i);
      if (guard.isEmpty()) return null;
      if (isCovered(guard, i, places.guards)) continue;
      Expression all = null;
      for (int j = 0; j < guard.size(); j++) {
        Expression condition = (Expression) guard.get(j);
        if (places.refusal == null) places.refusal = refusal(condition);
        if (places.refusal != null) return null;
        // Conditions that cannot be used, and those behind them, count as met.
        if (holdsOpen(condition, scope)) break;
        Expression found = rewrite(condition, scope);
        if (found.containsPattern(TreePattern.PYTHON_UDF()) && Exprs.size(found, MOST_NODES) >= MOST_NODES) break;
        all = all == null ? found : new And(all, found);
      }
      if (all == null) return null;
      any = any == null ? all : new Or(any, all);
    }
    return any;
  }

  /** Do the conditions of another place hold wherever these do? */
  private boolean isCovered(ArrayList guard, int number, ArrayList guards) {
    for (int i = 0; i < guards.size(); i++) {
      ArrayList other = (ArrayList) guards.get(i);
      if (i == number || other.size() > guard.size() || (other.size() == guard.size() && i > number)) continue;
      boolean begins = true;
      for (int j = 0; begins && j < other.size(); j++) {
        begins = ((Expression) other.get(j)).semanticEquals((Expression) guard.get(j));
      }
      if (begins) return true;
    }
    return false;
  }

  private static String refusal(Expression condition) {
    if (!condition.deterministic()) return "a condition around it is not deterministic";
    if (condition.containsPattern(TreePattern.WINDOW_EXPRESSION())) return "a condition around it holds a window";
    return holdsSubquery(condition) ? "a condition around it holds a correlated subquery" : null;
  }

  /** A subquery that Spark makes a join of: it would be made twice. */
  private static boolean holdsSubquery(Expression expression) {
    if (!expression.containsPattern(TreePattern.PLAN_EXPRESSION())) return false;
    if (expression instanceof SubqueryExpression) {
      return !(expression instanceof ScalarSubquery) || ((ScalarSubquery) expression).isCorrelated();
    }
    Iterator children = expression.children().iterator();
    while (children.hasNext()) {
      if (holdsSubquery((Expression) children.next())) return true;
    }
    return false;
  }

  /** Does the condition hold a call whose own mask is being made? */
  private boolean holdsOpen(Expression expression, int scope) {
    if (!expression.containsPattern(TreePattern.PYTHON_UDF())) return false;
    if (expression instanceof AggregateExpression || expression instanceof WindowExpression) scope = 0;
    if (Exprs.isCall(expression) && Exprs.isOpen((PythonUDF) expression)) {
      if (places((PythonUDF) expression, scope).isOpen) return true;
    }
    Iterator children = expression.children().iterator();
    while (children.hasNext()) {
      if (holdsOpen((Expression) children.next(), scope)) return true;
    }
    return false;
  }
}
