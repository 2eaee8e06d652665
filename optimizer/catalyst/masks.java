// Masks for the calls of a plan (rules/mask_conditional_calls.py). Here because it looks at every expression of a plan.
package sparkllm;

import java.util.ArrayList;
import java.util.LinkedHashSet;
import java.util.Map;
import java.util.Set;
import org.apache.spark.sql.catalyst.expressions.Expression;
import org.apache.spark.sql.catalyst.plans.Cross$;
import org.apache.spark.sql.catalyst.plans.Inner$;
import org.apache.spark.sql.catalyst.plans.logical.Aggregate;
import org.apache.spark.sql.catalyst.plans.logical.Filter;
import org.apache.spark.sql.catalyst.plans.logical.Join;
import org.apache.spark.sql.catalyst.plans.logical.LogicalPlan;
import org.apache.spark.sql.catalyst.trees.TreePattern;
import scala.collection.Iterator;

/** What the rule asks. */
public final class Masks {
  private static final String OPERATORS = " Aggregate Expand Filter Generate Join Project RepartitionByExpression Sort Window ";

  /** The plan with masks, and what was made: {plan, specs of the calls that got one, notes of calls}; a note is
   * {"1" or "" for not masked, prompt, why}. specs: for a spec that of a call with a mask, a literal. */
  public Object[] rewrite(LogicalPlan plan, Map specs) {
    Set made = new LinkedHashSet();
    ArrayList notes = new ArrayList();
    LogicalPlan changed = rewrite(plan, specs, made, notes);
    return new Object[] {changed, new ArrayList(made), notes};
  }

  /** The same for an expression of a Project. */
  public Object[] rewrite(Expression expression, Map specs) {
    Set made = new LinkedHashSet();
    ArrayList notes = new ArrayList();
    OperatorCalls calls = new OperatorCalls(specs, made, notes);
    calls.see(expression, new ArrayList(), false, 1);
    return new Object[] {calls.rewrite(expression, 1), new ArrayList(made), notes};
  }

  private LogicalPlan rewrite(LogicalPlan plan, Map specs, Set made, ArrayList notes) {
    if (!plan.containsPattern(TreePattern.PYTHON_UDF())) return plan;
    ArrayList children = Exprs.list(plan.children());
    boolean isChanged = false;
    for (int i = 0; i < children.size(); i++) {
      Object child = children.get(i);
      children.set(i, rewrite((LogicalPlan) child, specs, made, notes));
      isChanged = isChanged || children.get(i) != child;
    }
    if (isChanged) plan = (LogicalPlan) plan.withNewChildren(Exprs.seq(children));
    if (OPERATORS.indexOf(" " + plan.nodeName() + " ") < 0) return plan;
    OperatorCalls calls = new OperatorCalls(specs, made, notes);
    if (plan instanceof Filter) {
      seeConjuncts(((Filter) plan).condition(), calls);
    } else if (plan instanceof Join) {
      Join join = (Join) plan;
      // A mask could tie a call on one side of an outer join to the other.
      if (join.joinType() != Inner$.MODULE$ && !(join.joinType() instanceof Cross$)) return plan;
      if (join.condition().isEmpty()) return plan;
      seeConjuncts((Expression) join.condition().get(), calls);
    } else if (plan instanceof Aggregate) {
      seeAggregate((Aggregate) plan, calls);
    } else {
      ArrayList expressions = Exprs.list(plan.expressions());
      for (int i = 0; i < expressions.size(); i++) {
        calls.see((Expression) expressions.get(i), new ArrayList(), false, 1);
      }
    }
    return calls.known.isEmpty() ? plan : (LogicalPlan) plan.mapExpressions(new Rewriting(calls));
  }

  /** The conjuncts of a filter: Spark and other rules put them into order. */
  private void seeConjuncts(Expression condition, OperatorCalls calls) {
    ArrayList conjuncts = Exprs.operands(condition, true);
    ArrayList before = new ArrayList();
    for (int i = 0; i < conjuncts.size(); i++) {
      Expression conjunct = (Expression) conjuncts.get(i);
      if (!conjunct.containsPattern(TreePattern.PYTHON_UDF())) continue;
      calls.prefix = Exprs.isSafe(conjunct) ? new ArrayList() : before;
      calls.see(conjunct, new ArrayList(), true, 1);
      before = new ArrayList(before);
      before.add(Exprs.isTrue(conjunct));
    }
    calls.prefix = new ArrayList();
  }

  /** Scope 0 is what is computed of rows, 1 what is computed of groups; keys stand in both, and have to stay equal. */
  private void seeAggregate(Aggregate aggregate, OperatorCalls calls) {
    ArrayList keys = Exprs.list(aggregate.groupingExpressions());
    ArrayList results = Exprs.list(aggregate.aggregateExpressions());
    for (int scope = 0; scope < 2; scope++) {
      for (int i = 0; i < keys.size(); i++) seeNeeded((Expression) keys.get(i), calls, scope);
    }
    for (int i = 0; i < results.size(); i++) calls.see((Expression) results.get(i), new ArrayList(), false, 1);
  }

  private void seeNeeded(Expression expression, OperatorCalls calls, int scope) {
    if (Exprs.isCall(expression)) calls.see(expression, new ArrayList(), false, scope);
    Iterator children = expression.children().iterator();
    while (children.hasNext()) seeNeeded((Expression) children.next(), calls, scope);
  }
}

/** An operator's expression to the one with masks. */
final class Rewriting extends scala.runtime.AbstractFunction1 {
  private final OperatorCalls calls;

  Rewriting(OperatorCalls calls) { this.calls = calls; }

  public Object apply(Object expression) { return calls.rewrite((Expression) expression, 1); }
}
