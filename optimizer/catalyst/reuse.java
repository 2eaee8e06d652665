// ReuseAnswers' work on plans: which call's answer a call above can take.
package sparkllm;

import java.util.ArrayList;
import java.util.HashMap;
import org.apache.spark.sql.catalyst.expressions.Alias;
import org.apache.spark.sql.catalyst.expressions.Attribute;
import org.apache.spark.sql.catalyst.expressions.Expression;
import org.apache.spark.sql.catalyst.expressions.If;
import org.apache.spark.sql.catalyst.expressions.Literal;
import org.apache.spark.sql.catalyst.expressions.Or;
import org.apache.spark.sql.catalyst.expressions.PythonUDF;
import org.apache.spark.sql.catalyst.plans.logical.ArrowEvalPython;
import org.apache.spark.sql.catalyst.plans.logical.Generate;
import org.apache.spark.sql.catalyst.plans.logical.Join;
import org.apache.spark.sql.catalyst.plans.logical.LogicalPlan;
import org.apache.spark.sql.catalyst.plans.logical.Project;
import org.apache.spark.sql.catalyst.trees.TreePattern;
import org.apache.spark.sql.types.DataTypes;
import scala.collection.Iterator;

/** Questions about calls that stand in several places. A call's text is its spec as it stands in the plan. */
public final class Reuse {
  /** The texts of all single calls whose answers are no matter of chance, with a record separator between. */
  public String texts(LogicalPlan plan) {
    StringBuilder texts = new StringBuilder();
    collect(plan, texts);
    return texts.toString();
  }

  private void collect(LogicalPlan plan, StringBuilder texts) {
    if (!plan.containsPattern(TreePattern.EVAL_PYTHON_UDF())) return;
    if (plan instanceof ArrowEvalPython) {
      Iterator udfs = ((ArrowEvalPython) plan).udfs().iterator();
      while (udfs.hasNext()) {
        PythonUDF udf = (PythonUDF) udfs.next();
        if (!Reuser.isCall(udf)) continue;
        if (texts.length() > 0) texts.append('\u001e');
        texts.append(Columns.spec(udf));
      }
    }
    Iterator children = plan.children().iterator();
    while (children.hasNext()) collect((LogicalPlan) children.next(), texts);
  }

  /** The plan where calls take the answers of equal ones below, and the prompts of those that did, "" if not constant.
   * keys: for each of the texts what it asks for, but for its mask: "m" and so on if it has one. */
  public Object[] reused(LogicalPlan plan, scala.collection.immutable.Seq texts, scala.collection.immutable.Seq keys) {
    Reuser reuser = new Reuser(texts, keys);
    LogicalPlan changed = reuser.apply(plan);
    return new Object[] {changed, reuser.prompts};
  }
}

/** One plan's work. */
final class Reuser {
  final ArrayList prompts = new ArrayList();
  private final HashMap keys = new HashMap();

  Reuser(scala.collection.immutable.Seq texts, scala.collection.immutable.Seq keys) {
    for (int i = 0; i < texts.size(); i++) this.keys.put(texts.apply(i), keys.apply(i));
  }

  static boolean isCall(PythonUDF udf) {
    return "llm".equals(udf.name()) && udf.deterministic() && udf.children().head() instanceof Literal;
  }

  /** Children first, so that a call finds below it only calls that stay. */
  LogicalPlan apply(LogicalPlan plan) {
    if (!plan.containsPattern(TreePattern.EVAL_PYTHON_UDF())) return plan;
    ArrayList children = new ArrayList();
    boolean isChanged = false;
    Iterator old = plan.children().iterator();
    while (old.hasNext()) {
      LogicalPlan child = (LogicalPlan) old.next();
      LogicalPlan changed = apply(child);
      isChanged = isChanged || changed != child;
      children.add(changed);
    }
    if (!isChanged && !(plan instanceof ArrowEvalPython)) return plan;
    if (isChanged) plan = (LogicalPlan) plan.withNewChildren(Columns.seq(children));
    if (plan instanceof Project) return Columns.merged((Project) plan);
    return plan instanceof ArrowEvalPython ? served((ArrowEvalPython) plan) : plan;
  }

  private LogicalPlan served(ArrowEvalPython node) {
    for (int i = 0; i < node.udfs().size(); i++) {
      PythonUDF udf = (PythonUDF) node.udfs().apply(i);
      if (!isCall(udf) || !keys.containsKey(Columns.spec(udf))) continue;
      Wanted wanted = new Wanted(udf, (String) keys.get(Columns.spec(udf)));
      Found found = find(node.child(), wanted, true);
      if (found == null) continue;
      Object prompt = wanted.arguments[0];
      prompts.add(prompt instanceof Literal ? String.valueOf(((Literal) prompt).value()) : "");
      return without(node, i, found, wanted);
    }
    return node;
  }

  /** The node with what is found instead of its call number i. */
  private LogicalPlan without(ArrowEvalPython node, int number, Found found, Wanted wanted) {
    ArrayList udfs = new ArrayList();
    ArrayList attributes = new ArrayList();
    for (int i = 0; i < node.udfs().size(); i++) {
      if (i == number) continue;
      udfs.add(node.udfs().apply(i));
      attributes.add(node.resultAttrs().apply(i));
    }
    LogicalPlan below = found.plan;
    if (!udfs.isEmpty()) {
      below = served(new ArrowEvalPython(Columns.seq(udfs), Columns.seq(attributes), below, node.evalType()));
    }
    Expression answer = found.attribute;
    if (wanted.mask != null && !found.hasMask) answer = where(wanted.mask, answer);
    Attribute result = (Attribute) node.resultAttrs().apply(number);
    return Columns.merged(new Project(replaced(node.output(), result, answer, null), below));
  }

  /** The columns, with `value AS column` for one of them and another behind if it is not null. */
  private scala.collection.immutable.Seq replaced(
      scala.collection.immutable.Seq output, Attribute column, Expression value, Attribute another) {
    ArrayList entries = new ArrayList();
    Iterator columns = output.iterator();
    while (columns.hasNext()) {
      Attribute entry = (Attribute) columns.next();
      entries.add(entry.exprId().equals(column.exprId()) ? (Object) Columns.alias(value, column) : (Object) entry);
    }
    if (another != null) entries.add(another);
    return Columns.seq(entries);
  }

  private Expression where(Expression mask, Expression answer) {
    return new If(mask, answer, Literal.create(null, DataTypes.StringType));
  }

  /** The plan with a column that has the wanted answer, or null. sameRows: the call's rows are exactly the plan's. */
  private Found find(LogicalPlan plan, Wanted wanted, boolean sameRows) {
    if (!plan.containsPattern(TreePattern.EVAL_PYTHON_UDF())) return null;
    if (plan instanceof ArrowEvalPython) {
      Found found = here((ArrowEvalPython) plan, wanted, sameRows);
      if (found != null) return found;
    }
    if (plan instanceof Join) {
      Join join = (Join) plan;
      Found left = Columns.keepsSide(join, true) ? find(join.left(), wanted, false) : null;
      if (left != null) return left.below(plan, join.right(), false);
      Found right = Columns.keepsSide(join, false) ? find(join.right(), wanted, false) : null;
      return right == null ? null : right.below(plan, join.left(), true);
    }
    if (plan instanceof Project) {
      Project project = (Project) plan;
      Found found = find(project.child(), wanted.below(project), sameRows);
      return found == null ? null : found.through(project);
    }
    if (!Columns.keepsValues(plan)) return null;
    Found found = find((LogicalPlan) plan.children().head(), wanted, sameRows && Columns.keepsRows(plan));
    if (found == null) return null;
    return plan instanceof Generate ? found.through((Generate) plan) : found.below(plan, null, false);
  }

  private Found here(ArrowEvalPython node, Wanted wanted, boolean sameRows) {
    HashMap sources = null;
    for (int i = 0; i < node.udfs().size(); i++) {
      PythonUDF udf = (PythonUDF) node.udfs().apply(i);
      if (!isCall(udf) || !keys.containsKey(Columns.spec(udf))) continue;
      Wanted other = new Wanted(udf, (String) keys.get(Columns.spec(udf)));
      if (!other.key.equals(wanted.key) || other.arguments.length != wanted.arguments.length) continue;
      if (sources == null) sources = Columns.sources(node.child());
      if (!wanted.hasArgumentsOf(other, sources)) continue;
      Attribute answer = (Attribute) node.resultAttrs().apply(i);
      if (other.mask == null) return new Found(node, answer, false);
      if (wanted.mask != null && equal(wanted.mask, other.mask, sources)) return new Found(node, answer, true);
      if (sameRows && (wanted.mask == null || isGiven(wanted.mask, node.child()))) {
        return widened(node, i, other.mask, wanted);
      }
    }
    return null;
  }

  /** The node asking also for the rows of another call, all of which it has. */
  private Found widened(ArrowEvalPython node, int number, Expression mask, Wanted wanted) {
    PythonUDF udf = (PythonUDF) node.udfs().apply(number);
    ArrayList children = new ArrayList();
    for (int i = 0; i < udf.children().size(); i++) children.add(udf.children().apply(i));
    children.remove(children.size() - 1);
    if (wanted.mask == null) {
      children.set(0, wanted.udf.children().head());
    } else {
      children.add(new Or(mask, wanted.mask));
    }
    Attribute narrow = (Attribute) node.resultAttrs().apply(number);
    Attribute wide = narrow.newInstance();
    PythonUDF changed = new PythonUDF(udf.name(), udf.func(), udf.dataType(), Columns.seq(children), udf.evalType(),
        udf.udfDeterministic(), udf.resultId());
    ArrowEvalPython asking = new ArrowEvalPython(
        (scala.collection.immutable.Seq) node.udfs().updated(number, changed),
        (scala.collection.immutable.Seq) node.resultAttrs().updated(number, wide), node.child(), node.evalType());
    return new Found(new Project(replaced(node.output(), narrow, where(mask, wide), wide), asking), wide, false);
  }

  private static boolean isGiven(Expression mask, LogicalPlan plan) {
    return mask.deterministic() && mask.references().subsetOf(plan.outputSet());
  }

  static boolean equal(Expression one, Expression other, HashMap sources) {
    return one.semanticEquals(other) || Columns.traced(one, sources).semanticEquals(Columns.traced(other, sources));
  }
}

/** A call by what it asks about, in the columns of the node that is looked at. */
final class Wanted {
  final PythonUDF udf;
  final String key;
  final Expression[] arguments;
  final Expression mask;

  Wanted(PythonUDF udf, String key) {
    boolean isMasked = key.startsWith("m");
    int count = udf.children().size() - 1;
    this.udf = udf;
    this.key = key.substring(1);
    this.mask = isMasked ? (Expression) udf.children().apply(count) : null;
    this.arguments = new Expression[isMasked ? count - 1 : count];
    for (int i = 0; i < arguments.length; i++) arguments[i] = (Expression) udf.children().apply(i + 1);
  }

  private Wanted(Wanted above, Project project) {
    udf = above.udf;
    key = above.key;
    mask = above.mask == null ? null : Columns.below(above.mask, project);
    arguments = new Expression[above.arguments.length];
    for (int i = 0; i < arguments.length; i++) arguments[i] = Columns.below(above.arguments[i], project);
  }

  Wanted below(Project project) { return new Wanted(this, project); }

  boolean hasArgumentsOf(Wanted other, HashMap sources) {
    for (int i = 0; i < arguments.length; i++) {
      if (!Reuser.equal(arguments[i], other.arguments[i], sources)) return false;
    }
    return true;
  }
}

/** A plan with the column of an answer; hasMask: it is NULL just where the wanted call's mask says so. */
final class Found {
  final LogicalPlan plan;
  final Attribute attribute;
  final boolean hasMask;

  Found(LogicalPlan plan, Attribute attribute, boolean hasMask) {
    this.plan = plan;
    this.attribute = attribute;
    this.hasMask = hasMask;
  }

  /** The same below a node that hands on its child's columns; beside: the node's other child. */
  Found below(LogicalPlan node, LogicalPlan beside, boolean isRight) {
    ArrayList children = new ArrayList();
    children.add(plan);
    if (beside != null) children.add(isRight ? 0 : 1, beside);
    return new Found((LogicalPlan) node.withNewChildren(Columns.seq(children)), attribute, hasMask);
  }

  Found through(Project project) {
    ArrayList entries = new ArrayList();
    Iterator old = project.projectList().iterator();
    while (old.hasNext()) {
      Object entry = old.next();
      if (entry instanceof Attribute && ((Attribute) entry).exprId().equals(attribute.exprId())) {
        return below(project, null, false);
      }
      if (entry instanceof Alias && ((Alias) entry).child() instanceof Attribute
          && ((Attribute) ((Alias) entry).child()).exprId().equals(attribute.exprId())) {
        Found renamed = below(project, null, false);
        return new Found(renamed.plan, ((Alias) entry).toAttribute(), hasMask);
      }
      entries.add(entry);
    }
    entries.add(attribute);
    return new Found(new Project(Columns.seq(entries), plan), attribute, hasMask);
  }

  /** Its unrequired columns go by number. */
  Found through(Generate generate) {
    java.util.HashSet dropped = new java.util.HashSet();
    for (int i = 0; i < generate.unrequiredChildIndex().size(); i++) {
      int number = ((Integer) generate.unrequiredChildIndex().apply(i)).intValue();
      dropped.add(((Attribute) generate.child().output().apply(number)).exprId());
    }
    dropped.remove(attribute.exprId());
    ArrayList numbers = new ArrayList();
    for (int i = 0; i < plan.output().size(); i++) {
      if (dropped.contains(((Attribute) plan.output().apply(i)).exprId())) numbers.add(Integer.valueOf(i));
    }
    return new Found(
        new Generate(generate.generator(), Columns.seq(numbers), generate.outer(), generate.qualifier(),
            generate.generatorOutput(), plan),
        attribute, hasMask);
  }
}
