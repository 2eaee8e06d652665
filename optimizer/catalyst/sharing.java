// ReuseAnswers' work on several branches of a plan that ask the same of the same rows.
package sparkllm;

import java.util.ArrayList;
import java.util.HashMap;
import java.util.HashSet;
import java.util.IdentityHashMap;
import java.util.TreeSet;
import org.apache.spark.sql.catalyst.expressions.And;
import org.apache.spark.sql.catalyst.expressions.Attribute;
import org.apache.spark.sql.catalyst.expressions.BoundReference;
import org.apache.spark.sql.catalyst.expressions.Expression;
import org.apache.spark.sql.catalyst.expressions.Literal;
import org.apache.spark.sql.catalyst.expressions.PythonUDF;
import org.apache.spark.sql.catalyst.expressions.SubqueryExpression;
import org.apache.spark.sql.catalyst.plans.logical.Aggregate;
import org.apache.spark.sql.catalyst.plans.logical.ArrowEvalPython;
import org.apache.spark.sql.catalyst.plans.logical.Filter;
import org.apache.spark.sql.catalyst.plans.logical.GlobalLimit;
import org.apache.spark.sql.catalyst.plans.logical.LogicalPlan;
import org.apache.spark.sql.catalyst.plans.logical.Project;
import org.apache.spark.sql.catalyst.plans.logical.RebalancePartitions;
import org.apache.spark.sql.catalyst.plans.logical.Repartition;
import org.apache.spark.sql.catalyst.plans.logical.RepartitionByExpression;
import org.apache.spark.sql.catalyst.plans.logical.Sort;
import org.apache.spark.sql.catalyst.plans.logical.Window;
import org.apache.spark.sql.catalyst.trees.TreePattern;
import org.apache.spark.sql.types.ArrayType;
import org.apache.spark.sql.types.DataType;
import org.apache.spark.sql.types.MapType;
import org.apache.spark.sql.types.StructType;
import scala.collection.Iterator;

/** Questions about branches. */
public final class Sharing {
  /** The plan where equal branches with calls end in equal exchanges, of which Spark runs one; and for each such
   * exchange the prompt of a call below ("" if not constant). texts: of the calls that are no matter of chance. */
  public Object[] shared(LogicalPlan plan, scala.collection.immutable.Seq texts) {
    Sharer sharer = new Sharer(texts);
    plan = sharer.equalBranches(plan);
    // Each round shares one call; one that stands above it may follow.
    for (int round = 0; round < 16; round++) {
      LogicalPlan changed = sharer.alikeBranches(plan);
      if (changed == plan) break;
      plan = changed;
    }
    return new Object[] {plan, sharer.prompts};
  }
}

final class Sharer {
  final ArrayList prompts = new ArrayList();
  private final HashSet texts = new HashSet();

  Sharer(scala.collection.immutable.Seq texts) {
    for (int i = 0; i < texts.size(); i++) this.texts.add(texts.apply(i));
  }

  static boolean holdsCall(LogicalPlan plan) {
    return plan.containsPattern(TreePattern.EVAL_PYTHON_UDF()) && new Plans().holdsCall(plan);
  }

  private static boolean isCall(LogicalPlan plan) {
    return plan instanceof ArrowEvalPython && new Plans().isCall(plan);
  }

  private boolean mayShare(LogicalPlan plan) {
    if (!new Plans().isDeterministic(plan)) return false;
    if (isCall(plan)) {
      Iterator udfs = ((ArrowEvalPython) plan).udfs().iterator();
      while (udfs.hasNext()) {
        if (!texts.contains(Columns.spec((PythonUDF) udfs.next()))) return false;
      }
    }
    Iterator children = plan.children().iterator();
    while (children.hasNext()) {
      if (!mayShare((LogicalPlan) children.next())) return false;
    }
    return true;
  }

  // Branches that are equal

  LogicalPlan equalBranches(LogicalPlan plan) {
    return equalBranches(plan, counts(plan), 1);
  }

  /** How many branches with calls there are of each kind. */
  private static HashMap counts(LogicalPlan plan) {
    HashMap counts = new HashMap();
    count(plan, null, counts);
    return counts;
  }

  /** A Project that only names columns is the same to Spark as what it stands on. */
  private static void count(LogicalPlan plan, LogicalPlan above, HashMap counts) {
    if (!holdsCall(plan)) return;
    LogicalPlan kind = (LogicalPlan) plan.canonicalized();
    if (!kind.equals(above)) {
      Integer before = (Integer) counts.get(kind);
      counts.put(kind, Integer.valueOf(before == null ? 1 : before.intValue() + 1));
    }
    Iterator children = plan.children().iterator();
    while (children.hasNext()) count((LogicalPlan) children.next(), kind, counts);
  }

  private static boolean isRepeated(LogicalPlan plan, HashMap counts) {
    return count(plan, counts) > 1;
  }

  private static int count(LogicalPlan plan, HashMap counts) {
    return ((Integer) counts.get(plan.canonicalized())).intValue();
  }

  /** places: in so many the plan stands as a part of an equal branch that ends in an exchange itself; 1: it does not.
   * What stands in more places ends in one wherever it stands, or the rule would find it repeated again and again. */
  private LogicalPlan equalBranches(LogicalPlan plan, HashMap counts, int places) {
    if (!holdsCall(plan)) return plan;
    int count = count(plan, counts);
    // A Project that only names columns stays above the exchange: what Spark runs would be another plan for each name.
    if (count <= places || (plan instanceof Project && plan.canonicalized().equals(((Project) plan).child().canonicalized()))) {
      return inChildren(plan, counts, places);
    }
    plan = inChildren(plan, counts, count);
    if (!runsCall(plan) || isOrdered(plan) || !mayShare(plan)) return plan;
    LogicalPlan exchange = exchange(plan);
    if (exchange != plan) prompts.add(prompt(plan));
    return exchange;
  }

  private LogicalPlan inChildren(LogicalPlan plan, HashMap counts, int places) {
    ArrayList children = new ArrayList();
    boolean isChanged = false;
    Iterator old = plan.children().iterator();
    while (old.hasNext()) {
      LogicalPlan child = (LogicalPlan) old.next();
      LogicalPlan changed = equalBranches(child, counts, places);
      // Upon an equal exchange another one would do nothing.
      if (changed != child && isExchange(plan) && changed.canonicalized().equals(plan.canonicalized())) changed = child;
      isChanged = isChanged || changed != child;
      children.add(changed);
    }
    return isChanged ? (LogicalPlan) plan.withNewChildren(Columns.seq(children)) : plan;
  }

  /** Does running the plan run a call with no exchange between? */
  private static boolean runsCall(LogicalPlan plan) {
    if (!holdsCall(plan) || isExchange(plan)) return false;
    if (isCall(plan)) return true;
    Iterator children = plan.children().iterator();
    while (children.hasNext()) {
      if (runsCall((LogicalPlan) children.next())) return true;
    }
    return false;
  }

  private static boolean isExchange(LogicalPlan plan) {
    return plan instanceof RepartitionByExpression || plan instanceof RebalancePartitions || plan instanceof Aggregate
        || plan instanceof GlobalLimit || plan instanceof Window
        || (plan instanceof Repartition && ((Repartition) plan).shuffle())
        || (plan instanceof Sort && ((Sort) plan).global());
  }

  /** Do the rows come in an order that somebody asked for? */
  private static boolean isOrdered(LogicalPlan plan) {
    while (plan instanceof Project || plan instanceof Filter || plan instanceof ArrowEvalPython || Columns.isLimit(plan)) {
      plan = (LogicalPlan) plan.children().head();
    }
    return plan instanceof Sort;
  }

  private static LogicalPlan exchange(LogicalPlan plan) {
    ArrayList keys = new ArrayList();
    for (int i = 0; i < plan.output().size(); i++) {
      Attribute column = (Attribute) plan.output().apply(i);
      if (canHash(column.dataType())) keys.add(column);
    }
    if (keys.isEmpty()) return plan;
    return new RepartitionByExpression(Columns.seq(keys), plan, scala.Option.empty(), scala.Option.empty());
  }

  private static boolean canHash(DataType type) {
    return !(type instanceof MapType) && !(type instanceof StructType) && !(type instanceof ArrayType);
  }

  private static String prompt(LogicalPlan plan) {
    if (isCall(plan)) {
      PythonUDF udf = (PythonUDF) ((ArrowEvalPython) plan).udfs().head();
      Object prompt = udf.children().apply(1);
      return prompt instanceof Literal ? String.valueOf(((Literal) prompt).value()) : "";
    }
    Iterator children = plan.children().iterator();
    while (children.hasNext()) {
      LogicalPlan child = (LogicalPlan) children.next();
      if (holdsCall(child)) return prompt(child);
    }
    return "";
  }

  // Branches that ask the same of the same table, but differ in columns or filters

  /** The plan with one group of such branches sharing their call; the same plan if there is none. */
  LogicalPlan alikeBranches(LogicalPlan plan) {
    ArrayList branches = new ArrayList();
    collect(plan, new ArrayList(), branches, counts(plan));
    for (int i = 0; i < branches.size(); i++) {
      Branch first = (Branch) branches.get(i);
      ArrayList group = new ArrayList();
      Branch widest = first;
      for (int j = 0; j < branches.size(); j++) {
        Branch other = (Branch) branches.get(j);
        if (!first.asksTheSame(other)) continue;
        group.add(other);
        if (other.conditions.size() < widest.conditions.size()) widest = other;
      }
      for (int j = group.size() - 1; j >= 0; j--) {
        Branch other = (Branch) group.get(j);
        if (!other.hasConditionsOf(widest) || (other != widest && widest.isBelow(other))) group.remove(j);
      }
      if (group.size() < 2) continue;
      prompts.add(prompt(first.call));
      return replaced(plan, shared(group, widest));
    }
    return plan;
  }

  private void collect(LogicalPlan plan, ArrayList above, ArrayList branches, HashMap counts) {
    // Below an exchange that some other branch has, too, nothing is left to do.
    if (!holdsCall(plan) || (isExchange(plan) && isRepeated(plan, counts))) return;
    above.add(plan);
    Iterator children = plan.children().iterator();
    while (children.hasNext()) collect((LogicalPlan) children.next(), above, branches, counts);
    above.remove(above.size() - 1);
    if (isCall(plan) && ((ArrowEvalPython) plan).udfs().size() == 1 && mayShare(plan) && !isOrdered(plan)) {
      branches.add(Branch.of((ArrowEvalPython) plan, above));
    }
  }

  private IdentityHashMap shared(ArrayList group, Branch widest) {
    TreeSet columns = new TreeSet();
    for (int i = 0; i < group.size(); i++) columns.addAll(((Branch) group.get(i)).columns());
    IdentityHashMap changed = new IdentityHashMap();
    for (int i = 0; i < group.size(); i++) {
      Branch branch = (Branch) group.get(i);
      LogicalPlan asking = branch.asking(columns, widest);
      changed.put(branch.call, branch.over(exchange(asking), widest));
    }
    return changed;
  }

  private static LogicalPlan replaced(LogicalPlan plan, IdentityHashMap changed) {
    if (changed.containsKey(plan)) return (LogicalPlan) changed.get(plan);
    if (!holdsCall(plan)) return plan;
    ArrayList children = new ArrayList();
    boolean isChanged = false;
    Iterator old = plan.children().iterator();
    while (old.hasNext()) {
      LogicalPlan child = (LogicalPlan) old.next();
      LogicalPlan found = replaced(child, changed);
      isChanged = isChanged || found != child;
      children.add(found);
    }
    if (!isChanged) return plan;
    plan = (LogicalPlan) plan.withNewChildren(Columns.seq(children));
    return plan instanceof Project ? Columns.merged((Project) plan) : plan;
  }
}

/** A call over Filters and Projects of some base; everything in the base's columns, which are numbered. */
final class Branch {
  final ArrowEvalPython call;
  final ArrayList above;
  final LogicalPlan base;
  /** The call's columns, and those of its input, as expressions over the base. */
  final ArrayList arguments = new ArrayList();
  final ArrayList input = new ArrayList();
  ArrayList conditions = new ArrayList();
  private final HashMap numbers = new HashMap();

  private Branch(ArrowEvalPython call, ArrayList above, LogicalPlan base) {
    this.call = call;
    this.above = above;
    this.base = base;
    for (int i = 0; i < base.output().size(); i++) {
      Attribute column = (Attribute) base.output().apply(i);
      numbers.put(column.exprId(), new BoundReference(i, column.dataType(), true));
    }
  }

  static Branch of(ArrowEvalPython call, ArrayList above) {
    PythonUDF udf = (PythonUDF) call.udfs().head();
    ArrayList arguments = new ArrayList();
    for (int i = 1; i < udf.children().size(); i++) arguments.add(udf.children().apply(i));
    ArrayList input = new ArrayList();
    for (int i = 0; i < call.child().output().size(); i++) input.add(call.child().output().apply(i));
    ArrayList conditions = new ArrayList();
    LogicalPlan plan = call.child();
    while (true) {
      if (plan instanceof Project) {
        below(arguments, (Project) plan);
        below(input, (Project) plan);
        below(conditions, (Project) plan);
        plan = ((Project) plan).child();
      } else if (plan instanceof Filter && !SubqueryExpression.hasSubquery(((Filter) plan).condition())) {
        conjuncts(((Filter) plan).condition(), conditions);
        plan = ((Filter) plan).child();
      } else {
        break;
      }
    }
    Branch branch = new Branch(call, new ArrayList(above), plan);
    branch.arguments.addAll(arguments);
    branch.input.addAll(input);
    branch.conditions = conditions;
    return branch;
  }

  private static void below(ArrayList expressions, Project project) {
    for (int i = 0; i < expressions.size(); i++) {
      expressions.set(i, Columns.below((Expression) expressions.get(i), project));
    }
  }

  private static void conjuncts(Expression condition, ArrayList into) {
    if (condition instanceof And) {
      conjuncts(((And) condition).left(), into);
      conjuncts(((And) condition).right(), into);
    } else {
      into.add(condition);
    }
  }

  private Expression numbered(Object expression) {
    return Columns.with((Expression) expression, numbers).canonicalized();
  }

  boolean asksTheSame(Branch other) {
    if (this == other) return true;
    PythonUDF mine = (PythonUDF) call.udfs().head();
    PythonUDF theirs = (PythonUDF) other.call.udfs().head();
    if (!Columns.spec(mine).equals(Columns.spec(theirs)) || arguments.size() != other.arguments.size()) return false;
    if (!mine.name().equals(theirs.name()) || isBelow(other) || other.isBelow(this)) return false;
    for (int i = 0; i < arguments.size(); i++) {
      if (!numbered(arguments.get(i)).equals(other.numbered(other.arguments.get(i)))) return false;
    }
    return base.sameResult(other.base);
  }

  /** Does the other call stand above this one? */
  boolean isBelow(Branch other) {
    for (int i = 0; i < above.size(); i++) {
      if (above.get(i) == other.call) return true;
    }
    return false;
  }

  boolean hasConditionsOf(Branch other) {
    HashSet mine = new HashSet();
    for (int i = 0; i < conditions.size(); i++) mine.add(numbered(conditions.get(i)));
    for (int i = 0; i < other.conditions.size(); i++) {
      if (!mine.contains(other.numbered(other.conditions.get(i)))) return false;
    }
    return true;
  }

  /** The numbers of the base's columns that the branch needs. */
  TreeSet columns() {
    TreeSet found = new TreeSet();
    collect(arguments, found);
    collect(input, found);
    collect(conditions, found);
    return found;
  }

  private void collect(ArrayList expressions, TreeSet into) {
    for (int i = 0; i < expressions.size(); i++) {
      Iterator columns = ((Expression) expressions.get(i)).references().iterator();
      while (columns.hasNext()) {
        Object number = numbers.get(((Attribute) columns.next()).exprId());
        if (number != null) into.add(Integer.valueOf(((BoundReference) number).ordinal()));
      }
    }
  }

  /** The call over the base's columns and the conditions that all branches have. */
  LogicalPlan asking(TreeSet columns, Branch widest) {
    LogicalPlan plan = base;
    HashSet shared = new HashSet();
    for (int i = 0; i < widest.conditions.size(); i++) shared.add(widest.numbered(widest.conditions.get(i)));
    plan = filtered(plan, shared, true);
    ArrayList entries = new ArrayList();
    java.util.Iterator each = columns.iterator();
    while (each.hasNext()) entries.add(base.output().apply(((Integer) each.next()).intValue()));
    if (entries.size() < base.output().size()) plan = new Project(Columns.seq(entries), plan);
    PythonUDF udf = (PythonUDF) call.udfs().head();
    ArrayList children = new ArrayList();
    children.add(udf.children().head());
    children.addAll(arguments);
    ArrayList udfs = new ArrayList();
    udfs.add(udf.withNewChildren(Columns.seq(children)));
    return new ArrowEvalPython(Columns.seq(udfs), call.resultAttrs(), plan, call.evalType());
  }

  /** What the branch's own call gave, over the exchange. */
  LogicalPlan over(LogicalPlan exchange, Branch widest) {
    HashSet shared = new HashSet();
    for (int i = 0; i < widest.conditions.size(); i++) shared.add(widest.numbered(widest.conditions.get(i)));
    LogicalPlan plan = filtered(exchange, shared, false);
    ArrayList entries = new ArrayList();
    for (int i = 0; i < input.size(); i++) {
      Attribute column = (Attribute) call.child().output().apply(i);
      Expression source = (Expression) input.get(i);
      boolean isItself = source instanceof Attribute && ((Attribute) source).exprId().equals(column.exprId());
      entries.add(isItself ? (Object) column : (Object) Columns.alias(source, column));
    }
    entries.add(call.resultAttrs().head());
    return new Project(Columns.seq(entries), plan);
  }

  private LogicalPlan filtered(LogicalPlan plan, HashSet conditionsOf, boolean isIn) {
    Expression all = null;
    for (int i = 0; i < conditions.size(); i++) {
      if (conditionsOf.contains(numbered(conditions.get(i))) != isIn) continue;
      Expression condition = (Expression) conditions.get(i);
      all = all == null ? condition : new And(all, condition);
    }
    return all == null ? plan : new Filter(all, plan);
  }
}
