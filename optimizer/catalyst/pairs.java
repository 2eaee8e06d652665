// Joins whose condition holds a call over both sides (rules/semantic_join.py), found and put back.
package sparkllm;

import java.util.ArrayList;
import java.util.HashMap;
import java.util.HashSet;
import java.util.Map;
import java.util.Set;
import org.apache.spark.sql.catalyst.expressions.Alias;
import org.apache.spark.sql.catalyst.expressions.And;
import org.apache.spark.sql.catalyst.expressions.Attribute;
import org.apache.spark.sql.catalyst.expressions.Expression;
import org.apache.spark.sql.catalyst.expressions.Literal;
import org.apache.spark.sql.catalyst.expressions.MonotonicallyIncreasingID;
import org.apache.spark.sql.catalyst.expressions.PythonUDF;
import org.apache.spark.sql.catalyst.expressions.SubqueryExpression;
import org.apache.spark.sql.catalyst.optimizer.RewritePredicateSubquery;
import org.apache.spark.sql.catalyst.plans.Cross$;
import org.apache.spark.sql.catalyst.plans.Inner$;
import org.apache.spark.sql.catalyst.plans.logical.ArrowEvalPython;
import org.apache.spark.sql.catalyst.plans.logical.Filter;
import org.apache.spark.sql.catalyst.plans.logical.Join;
import org.apache.spark.sql.catalyst.plans.logical.LogicalPlan;
import org.apache.spark.sql.catalyst.plans.logical.Project;
import org.apache.spark.sql.catalyst.trees.TreePattern;
import org.apache.spark.sql.types.DataTypes;
import scala.collection.Iterator;

/** Questions about joins. */
public final class Pairs {
  // Nodes between a call and the join whose pairs it judges.
  private static final String PASSED = " ArrowEvalPython Filter Project RepartitionByExpression Sort ";
  private final Plans calls = new Plans();

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
    ArrayList conjuncts = Exprs.operands((Expression) join.condition().get(), true);
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
    return Trees.replaced(expression, names);
  }

  /** The nodes whose calls decide which pairs of a join's rows are kept, right above it: {node, join, columns between
   * them, what those are of the join's columns, conditions on its rows} each. */
  public ArrayList judges(LogicalPlan plan) {
    Set judged = new HashSet();
    collectJudged(plan, judged);
    ArrayList found = new ArrayList();
    collectJudges(plan, judged, found);
    return found;
  }

  /** The plan with a constant for its row ids, so that it is the same each time that it runs. */
  public LogicalPlan withoutRowIds(LogicalPlan plan) {
    ArrayList children = list(plan.children());
    boolean isChanged = false;
    for (int i = 0; i < children.size(); i++) {
      Object child = children.get(i);
      children.set(i, withoutRowIds((LogicalPlan) child));
      isChanged = isChanged || children.get(i) != child;
    }
    if (isChanged) plan = (LogicalPlan) plan.withNewChildren(seq(children));
    if (!(plan instanceof Project)) return plan;
    ArrayList entries = list(((Project) plan).projectList());
    for (int i = 0; i < entries.size(); i++) {
      if (!(entries.get(i) instanceof Alias)) continue;
      Alias entry = (Alias) entries.get(i);
      if (!(entry.child() instanceof MonotonicallyIncreasingID) || !"row_id".equals(entry.name())) continue;
      ArrayList constant = new ArrayList();
      constant.add(Literal.create(Long.valueOf(0), DataTypes.LongType));
      entries.set(i, entry.withNewChildren(seq(constant)));
    }
    return new Project(seq(entries), ((Project) plan).child());
  }

  /** The columns that filters look at, and those that joins made of pairs are made of. */
  private void collectJudged(LogicalPlan plan, Set judged) {
    if (!plan.containsPattern(TreePattern.EVAL_PYTHON_UDF())) return;
    if (plan instanceof Filter) collectColumns(((Filter) plan).condition(), judged);
    if (plan instanceof Project) {
      Iterator entries = ((Project) plan).projectList().iterator();
      while (entries.hasNext()) {
        Expression entry = (Expression) entries.next();
        if (entry instanceof Alias && "is_ok".equals(((Alias) entry).name())) collectColumns(entry, judged);
      }
    }
    Iterator children = plan.children().iterator();
    while (children.hasNext()) collectJudged((LogicalPlan) children.next(), judged);
  }

  private void collectColumns(Expression expression, Set ids) {
    Iterator columns = expression.references().iterator();
    while (columns.hasNext()) ids.add(((Attribute) columns.next()).exprId());
  }

  private void collectJudges(LogicalPlan plan, Set judged, ArrayList found) {
    if (!plan.containsPattern(TreePattern.EVAL_PYTHON_UDF())) return;
    Iterator children = plan.children().iterator();
    while (children.hasNext()) collectJudges((LogicalPlan) children.next(), judged, found);
    if (!(plan instanceof ArrowEvalPython) || !calls.isCall(plan)) return;
    Iterator results = ((ArrowEvalPython) plan).resultAttrs().iterator();
    boolean isJudge = false;
    while (results.hasNext()) isJudge = isJudge || judged.contains(((Attribute) results.next()).exprId());
    if (!isJudge) return;
    ArrayList path = new ArrayList();
    LogicalPlan below = plan;
    while (below == plan || PASSED.indexOf(" " + below.nodeName() + " ") >= 0) {
      path.add(0, below);
      below = (LogicalPlan) below.children().head();
    }
    if (!(below instanceof Join)) return;
    ArrayList columns = new ArrayList();
    ArrayList made = new ArrayList();
    ArrayList conditions = new ArrayList();
    for (int i = 0; i < path.size(); i++) {
      Object node = path.get(i);
      if (node instanceof Project) {
        Iterator entries = ((Project) node).projectList().iterator();
        while (entries.hasNext()) {
          Object entry = entries.next();
          if (!(entry instanceof Alias)) continue;
          Expression value = renamed(((Alias) entry).child(), columns, made);
          columns.add(((Alias) entry).toAttribute());
          made.add(value);
        }
      } else if (node instanceof Filter) {
        ArrayList conjuncts = Exprs.operands(((Filter) node).condition(), true);
        for (int j = 0; j < conjuncts.size(); j++) {
          Expression condition = renamed((Expression) conjuncts.get(j), columns, made);
          if (condition.references().subsetOf(below.outputSet())) conditions.add(condition);
        }
      }
    }
    found.add(new Object[] {plan, below, columns, made, conditions});
  }

  private static ArrayList list(scala.collection.Iterable values) { return Exprs.list(values); }

  private static scala.collection.immutable.IndexedSeq seq(ArrayList values) { return Exprs.seq(values); }
}
