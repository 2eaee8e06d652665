// LimitBeforeCalls' work on plans: limits go below the calls that they do not depend on.
package sparkllm;

import java.util.ArrayList;
import org.apache.spark.sql.catalyst.expressions.Alias;
import org.apache.spark.sql.catalyst.expressions.Attribute;
import org.apache.spark.sql.catalyst.expressions.CurrentRow$;
import org.apache.spark.sql.catalyst.expressions.Expression;
import org.apache.spark.sql.catalyst.expressions.GreaterThan;
import org.apache.spark.sql.catalyst.expressions.Literal;
import org.apache.spark.sql.catalyst.expressions.NamedExpression$;
import org.apache.spark.sql.catalyst.expressions.PythonUDF;
import org.apache.spark.sql.catalyst.expressions.RowFrame$;
import org.apache.spark.sql.catalyst.expressions.RowNumber;
import org.apache.spark.sql.catalyst.expressions.SortOrder;
import org.apache.spark.sql.catalyst.expressions.SpecifiedWindowFrame;
import org.apache.spark.sql.catalyst.expressions.UnboundedPreceding$;
import org.apache.spark.sql.catalyst.expressions.WindowExpression;
import org.apache.spark.sql.catalyst.expressions.WindowSpecDefinition;
import org.apache.spark.sql.catalyst.plans.logical.ArrowEvalPython;
import org.apache.spark.sql.catalyst.plans.logical.BaseEvalPython;
import org.apache.spark.sql.catalyst.plans.logical.Filter;
import org.apache.spark.sql.catalyst.plans.logical.Generate;
import org.apache.spark.sql.catalyst.plans.logical.GlobalLimit;
import org.apache.spark.sql.catalyst.plans.logical.Join;
import org.apache.spark.sql.catalyst.plans.logical.LocalLimit;
import org.apache.spark.sql.catalyst.plans.logical.LogicalPlan;
import org.apache.spark.sql.catalyst.plans.logical.Offset;
import org.apache.spark.sql.catalyst.plans.logical.Project;
import org.apache.spark.sql.catalyst.plans.logical.Sort;
import org.apache.spark.sql.catalyst.plans.logical.Union;
import org.apache.spark.sql.catalyst.plans.logical.Window;
import org.apache.spark.sql.catalyst.trees.TreePattern;
import org.apache.spark.sql.execution.LogicalRDD;
import org.apache.spark.sql.execution.columnar.InMemoryRelation;
import org.apache.spark.sql.internal.SQLConf;
import org.apache.spark.sql.types.DataTypes;
import scala.collection.Iterator;

/** Questions about limits above calls. */
public final class Limits {
  /** The plan with its limits moved; for each call that one passed "+", how many rows it is asked now (-1: not known),
   * a unit separator and its prompt ("" if not constant); for each that an OFFSET alone passed ">", how many rows that
   * drops, separator, prompt; for each that none may pass "-", why, separator, prompt. */
  public Object[] moved(LogicalPlan plan, Boolean mayMoveRoot) {
    Mover mover = new Mover();
    LogicalPlan changed = mover.apply(plan, -1, mayMoveRoot.booleanValue());
    return new Object[] {changed, mover.notes};
  }

  /** Do the rows of a plan whose root is a limit, but no TopK, come straight from a leaf, through calls and Projects? */
  public LogicalPlan straightLeaf(LogicalPlan plan) {
    if (!(plan instanceof GlobalLimit)) return null;
    while (Columns.isLimit(plan) || plan instanceof Project || plan instanceof BaseEvalPython) {
      plan = (LogicalPlan) plan.children().head();
    }
    return plan.children().isEmpty() ? plan : null;
  }

  /** How many rows the limit at the root of the plan takes from below, -1: not known. */
  public int rowsTaken(LogicalPlan plan) {
    ArrayList limits = new ArrayList();
    for (; Columns.isLimit(plan); plan = (LogicalPlan) plan.children().head()) limits.add(plan);
    return Mover.rows(limits);
  }

  /** The number of rows that the first limit below the node lets through, with nothing but Projects and functions
   * between; -1: there is none. */
  public int limitBelow(LogicalPlan plan) {
    while (plan instanceof Project || plan instanceof BaseEvalPython) plan = (LogicalPlan) plan.children().head();
    return plan instanceof GlobalLimit ? Mover.number(((GlobalLimit) plan).limitExpr()) : -1;
  }
}

final class Mover {
  final ArrayList notes = new ArrayList();

  static int number(Expression limit) {
    Object value = limit instanceof Literal ? ((Literal) limit).value() : null;
    return value instanceof Integer ? ((Integer) value).intValue() : -1;
  }

  /** needed: how many rows of the plan are needed in all, -1: perhaps all of them. */
  LogicalPlan apply(LogicalPlan plan, int needed, boolean mayMove) {
    if (!plan.containsPattern(TreePattern.EVAL_PYTHON_UDF())) return plan;
    ArrayList limits = new ArrayList();
    LogicalPlan below = plan;
    for (; Columns.isLimit(below); below = (LogicalPlan) below.children().head()) limits.add(below);
    if (limits.isEmpty()) return inChildren(plan, handsOn(plan) ? needed : -1);
    int rows = rows(limits);
    boolean isLone = isLone(limits);
    if (!isLone && plan instanceof GlobalLimit) needed = rows;
    // Spark puts a LocalLimit of its own below unions and outer joins: of these rows no more are needed in all.
    if (mayMove && (!isLone || (rows >= 0 && rows == needed))) {
      LogicalPlan moved = moved(limits, below, rows, isLone);
      if (moved != null) return moved;
    }
    return over(limits, apply(below, needed, true));
  }

  private LogicalPlan inChildren(LogicalPlan plan, int needed) {
    ArrayList children = new ArrayList();
    boolean isChanged = false;
    Iterator old = plan.children().iterator();
    while (old.hasNext()) {
      LogicalPlan child = (LogicalPlan) old.next();
      LogicalPlan changed = apply(child, needed, true);
      isChanged = isChanged || changed != child;
      children.add(changed);
    }
    return isChanged ? (LogicalPlan) plan.withNewChildren(Columns.seq(children)) : plan;
  }

  /** Do n rows of the node need no more than n rows of each child, as far as Spark has put limits there? */
  private static boolean handsOn(LogicalPlan plan) {
    return plan instanceof Project || plan instanceof Union || plan instanceof Join || plan instanceof BaseEvalPython;
  }

  /** The rows that limits take in, -1: not known. */
  static int rows(ArrayList limits) {
    LogicalPlan last = (LogicalPlan) limits.get(limits.size() - 1);
    if (last instanceof LocalLimit) return number(((LocalLimit) last).limitExpr());
    return last instanceof GlobalLimit ? number(((GlobalLimit) last).limitExpr()) : -1;
  }

  private static boolean isLone(ArrayList limits) {
    for (int i = 0; i < limits.size(); i++) {
      if (!(limits.get(i) instanceof LocalLimit)) return false;
    }
    return true;
  }

  private static LogicalPlan over(ArrayList nodes, LogicalPlan plan) {
    for (int i = nodes.size() - 1; i >= 0; i--) {
      LogicalPlan node = (LogicalPlan) nodes.get(i);
      if (node.children().head() != plan) {
        ArrayList child = new ArrayList();
        child.add(plan);
        node = (LogicalPlan) node.withNewChildren(Columns.seq(child));
      }
      plan = node;
    }
    return plan;
  }

  /** What stands for the limits over `plan` when they have passed the calls that they can; null if there is none. */
  private LogicalPlan moved(ArrayList limits, LogicalPlan plan, int rows, boolean isLone) {
    int dropped = rows < 0 ? dropped(limits) : 0;
    if (rows < 0 && dropped <= 0) return null;
    if (dropped > 0) rows = Integer.MAX_VALUE; // all that it leaves
    ArrayList above = new ArrayList();
    ArrayList calls = new ArrayList();
    Sort sort = null;
    Sort topSort = null;
    int aboveSort = 0;
    // Where the limits go: below the last call that they pass.
    int passed = 0;
    LogicalPlan below = null;
    Sort sortBelow = null;
    while (true) {
      if (plan instanceof Project && isDeterministic(((Project) plan).projectList())) {
        if (sort != null) sort = below(sort, (Project) plan);
      } else if (plan instanceof BaseEvalPython && sort != null && depends(sort, (BaseEvalPython) plan)) {
        note("-", "the rows are sorted by its answers", (BaseEvalPython) plan);
        break;
      } else if (plan instanceof BaseEvalPython && isDeterministic(((BaseEvalPython) plan).udfs())) {
        if (isCall(plan)) calls.add(plan);
      } else if (plan instanceof BaseEvalPython) {
        note("-", "its answers are drawn without a seed", (BaseEvalPython) plan);
        break;
      } else if (plan instanceof Sort && sort == null) {
        sort = (Sort) plan;
        topSort = sort;
        aboveSort = above.size();
        plan = sort.child();
        continue;
      } else if (plan instanceof LocalLimit && sort == null
          && number(((LocalLimit) plan).limitExpr()) >= rows) {
        plan = ((LocalLimit) plan).child();
        continue;
      } else {
        break;
      }
      above.add(plan);
      plan = (LogicalPlan) plan.children().head();
      if (isCall((LogicalPlan) above.get(above.size() - 1))) {
        passed = above.size();
        below = plan;
        sortBelow = sort;
      }
    }
    if (below == null) return null;
    if (dropped > 0 && sortBelow != null) {
      if (!sortBelow.global()) return null;
      for (int i = 0; i < calls.size(); i++) note(">", String.valueOf(dropped), (BaseEvalPython) calls.get(i));
      LogicalPlan rest = over(new ArrayList(above.subList(aboveSort, passed)), beyond(sortBelow, dropped, apply(below, -1, true)));
      rest = new Sort(topSort.order(), true, rest, topSort.hint());
      return over(new ArrayList(above.subList(0, aboveSort)), rest);
    }
    if (sortBelow == null ? losesOrder(below, rows) : !isTopK(sortBelow, rows)) {
      for (int i = 0; i < calls.size(); i++) {
        note("-", "the rows come in an order that a limit below would lose", (BaseEvalPython) calls.get(i));
      }
      return null;
    }
    for (int i = 0; i < calls.size(); i++) {
      note(dropped > 0 ? ">" : "+", String.valueOf(dropped > 0 ? dropped : rows), (BaseEvalPython) calls.get(i));
    }
    if (sortBelow == null && below instanceof LocalLimit
        && number(((LocalLimit) below).limitExpr()) >= rows) {
      below = ((LocalLimit) below).child();
    }
    LogicalPlan limited = apply(below, sortBelow == null && dropped == 0 ? rows : -1, true);
    if (sortBelow != null) limited = new Sort(sortBelow.order(), sortBelow.global(), limited, sortBelow.hint());
    limited = over(limits, limited);
    if (isLone) limited = new GlobalLimit(((LocalLimit) limits.get(0)).limitExpr(), limited);
    return over(new ArrayList(above.subList(0, passed)), limited);
  }

  /** The rows that a lone OFFSET drops; 0: it is something else. */
  private static int dropped(ArrayList limits) {
    return limits.size() == 1 && limits.get(0) instanceof Offset ? number(((Offset) limits.get(0)).offsetExpr()) : 0;
  }

  /** The rows of the plan but the first so many in the order of the sort. An Offset would not do: below the root of a
   * query Spark does not keep the order of the rows that it gathers for it. */
  private static LogicalPlan beyond(Sort sort, int dropped, LogicalPlan plan) {
    scala.collection.immutable.Seq none = Columns.seq(new ArrayList());
    SpecifiedWindowFrame frame = new SpecifiedWindowFrame(RowFrame$.MODULE$, UnboundedPreceding$.MODULE$, CurrentRow$.MODULE$);
    Expression number = new WindowExpression(new RowNumber(), new WindowSpecDefinition(none, sort.order(), frame));
    Alias named = new Alias(number, "row_number", NamedExpression$.MODULE$.newExprId(), none, scala.Option.empty(), none);
    ArrayList windows = new ArrayList();
    windows.add(named);
    LogicalPlan numbered = new Window(Columns.seq(windows), none, sort.order(), plan, scala.Option.empty());
    Literal last = Literal.create(Integer.valueOf(dropped), DataTypes.IntegerType);
    return new Project(plan.output(), new Filter(new GreaterThan(named.toAttribute(), last), numbered));
  }

  /** Does Spark take the first rows of the sort with the operator that keeps them in order? */
  private static boolean isTopK(Sort sort, int rows) {
    return !sort.global() || rows < SQLConf.get().topKSortFallbackThreshold();
  }

  /** Do the rows come in an order that a limit which gathers them from all partitions does not keep? */
  private static boolean losesOrder(LogicalPlan plan, int rows) {
    if (plan instanceof LocalLimit) plan = ((LocalLimit) plan).child();
    LogicalPlan source = plan instanceof Project ? ((Project) plan).child() : plan;
    if (source instanceof Sort && ((Sort) source).global()) return !isTopK((Sort) source, rows);
    while (source instanceof Project || source instanceof Filter || source instanceof BaseEvalPython
        || source instanceof Generate || Columns.isLimit(source)) {
      if (source instanceof GlobalLimit) return false;
      source = (LogicalPlan) source.children().head();
    }
    boolean isStored = source instanceof InMemoryRelation || source instanceof LogicalRDD;
    return source instanceof Sort || (isStored && source.outputOrdering().nonEmpty());
  }

  private static Sort below(Sort sort, Project project) {
    ArrayList orders = new ArrayList();
    Iterator old = sort.order().iterator();
    while (old.hasNext()) orders.add(Columns.below((Expression) old.next(), project));
    return new Sort(Columns.seq(orders), sort.global(), sort.child(), sort.hint());
  }

  private static boolean depends(Sort sort, BaseEvalPython node) {
    Iterator orders = sort.order().iterator();
    while (orders.hasNext()) {
      Iterator answers = node.resultAttrs().iterator();
      SortOrder order = (SortOrder) orders.next();
      while (answers.hasNext()) {
        if (order.references().contains((Attribute) answers.next())) return true;
      }
    }
    return false;
  }

  private static boolean isDeterministic(scala.collection.immutable.Seq expressions) {
    Iterator each = expressions.iterator();
    while (each.hasNext()) {
      if (!((Expression) each.next()).deterministic()) return false;
    }
    return true;
  }

  private static boolean isCall(LogicalPlan plan) {
    return plan instanceof ArrowEvalPython && new Plans().isCall(plan);
  }

  private void note(String sign, String what, BaseEvalPython node) {
    if (!isCall((LogicalPlan) node)) return;
    Iterator udfs = node.udfs().iterator();
    while (udfs.hasNext()) {
      PythonUDF udf = (PythonUDF) udfs.next();
      Object prompt = udf.children().apply(1);
      String text = prompt instanceof Literal ? String.valueOf(((Literal) prompt).value()) : "";
      notes.add(sign + what + "\u001f" + text);
    }
  }
}
