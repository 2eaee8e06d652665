// Where columns come from: for rules that compare an expression above some nodes with one below them.
package sparkllm;

import java.util.ArrayList;
import java.util.HashMap;
import org.apache.spark.sql.catalyst.expressions.Alias;
import org.apache.spark.sql.catalyst.expressions.And;
import org.apache.spark.sql.catalyst.expressions.Attribute;
import org.apache.spark.sql.catalyst.expressions.EqualTo;
import org.apache.spark.sql.catalyst.expressions.Expression;
import org.apache.spark.sql.catalyst.expressions.Literal;
import org.apache.spark.sql.catalyst.expressions.PythonUDF;
import org.apache.spark.sql.catalyst.plans.logical.ArrowEvalPython;
import org.apache.spark.sql.catalyst.plans.logical.BatchEvalPython;
import org.apache.spark.sql.catalyst.plans.logical.Filter;
import org.apache.spark.sql.catalyst.plans.logical.Generate;
import org.apache.spark.sql.catalyst.plans.logical.GlobalLimit;
import org.apache.spark.sql.catalyst.plans.logical.Join;
import org.apache.spark.sql.catalyst.plans.logical.LocalLimit;
import org.apache.spark.sql.catalyst.plans.logical.LogicalPlan;
import org.apache.spark.sql.catalyst.plans.logical.Offset;
import org.apache.spark.sql.catalyst.plans.logical.Project;
import org.apache.spark.sql.catalyst.plans.logical.RebalancePartitions;
import org.apache.spark.sql.catalyst.plans.logical.RepartitionOperation;
import org.apache.spark.sql.catalyst.plans.logical.Sample;
import org.apache.spark.sql.catalyst.plans.logical.Sort;
import org.apache.spark.sql.catalyst.plans.logical.Window;
import org.apache.spark.sql.catalyst.plans.logical.WindowGroupLimit;
import org.apache.spark.sql.types.DataType;
import org.apache.spark.sql.types.DataTypes;
import scala.collection.Iterator;
import scala.jdk.javaapi.CollectionConverters;

/** Columns along the lineage of rows. */
public final class Columns {
  /** Is each row of the node one of its child's rows with all values that the child's row has, and perhaps more? */
  public static boolean keepsValues(LogicalPlan plan) {
    return keepsRows(plan) || plan instanceof Filter || plan instanceof Generate || plan instanceof Sample
        || plan instanceof WindowGroupLimit || isLimit(plan);
  }

  public static boolean isLimit(LogicalPlan plan) {
    return plan instanceof GlobalLimit || plan instanceof LocalLimit || plan instanceof Offset;
  }

  /** The text of the spec in a call, or a group of calls. */
  public static String spec(PythonUDF call) {
    return ((Literal) call.children().head()).value().toString();
  }

  /** The same where the node has all rows of its child, each once. */
  public static boolean keepsRows(LogicalPlan plan) {
    return plan instanceof ArrowEvalPython || plan instanceof BatchEvalPython || plan instanceof Sort
        || plan instanceof Window || plan instanceof RepartitionOperation || plan instanceof RebalancePartitions;
  }

  /** Does the join keep the values of its left (right) side's rows: it may drop rows and repeat them, but NULLs none? */
  public static boolean keepsSide(Join join, boolean isLeft) {
    String type = join.joinType().sql();
    if ("INNER".equals(type) || "CROSS".equals(type)) return true;
    return isLeft ? type.startsWith("LEFT") : "RIGHT OUTER".equals(type);
  }

  /** The expression in the columns below a Project: what it makes at random stays as it is. */
  public static Expression below(Expression expression, Project project) {
    HashMap made = new HashMap();
    collect(project, made);
    return Trees.replaced(expression, made);
  }

  /** The expression with other expressions for columns, by expression id. */
  public static Expression with(Expression expression, HashMap columns) {
    return Trees.replaced(expression, columns);
  }

  /** What the columns of the plan are made of, as far down as they keep their values; by expression id. */
  public static HashMap sources(LogicalPlan plan) {
    HashMap made = new HashMap();
    collectSources(plan, made);
    return made;
  }

  /** The expression with columns replaced by their sources, again and again, and what is constant then by its value. */
  public static Expression traced(Expression expression, HashMap sources) {
    return sources.isEmpty() ? expression : folded(Trees.traced(expression, sources));
  }

  private static Expression folded(Expression expression) {
    if (expression instanceof Literal || expression instanceof Attribute) return expression;
    if (expression.foldable() && expression.deterministic()) {
      try {
        return Literal.create(expression.eval(null), expression.dataType());
      } catch (RuntimeException failing) {
        return expression;
      }
    }
    ArrayList children = new ArrayList();
    boolean isChanged = false;
    Iterator old = expression.children().iterator();
    while (old.hasNext()) {
      Expression child = (Expression) old.next();
      Expression found = folded(child);
      isChanged = isChanged || found != child;
      children.add(found);
    }
    return isChanged ? (Expression) expression.withNewChildren(seq(children)) : expression;
  }

  /** A Project without the Project below it, where that does no more than choose and name columns. */
  public static Project merged(Project above) {
    while (above.child() instanceof Project && onlyNames((Project) above.child())) {
      Project below = (Project) above.child();
      HashMap made = new HashMap();
      collect(below, made);
      ArrayList entries = new ArrayList();
      Iterator old = above.projectList().iterator();
      while (old.hasNext()) {
        Expression entry = (Expression) old.next();
        Object source = entry instanceof Attribute ? made.get(((Attribute) entry).exprId()) : null;
        if (source != null) {
          entries.add(alias((Expression) source, (Attribute) entry));
        } else {
          entries.add(Trees.replaced(entry, made));
        }
      }
      above = new Project(seq(entries), below.child());
    }
    return above;
  }

  private static boolean onlyNames(Project project) {
    Iterator entries = project.projectList().iterator();
    while (entries.hasNext()) {
      Object entry = entries.next();
      if (!(entry instanceof Attribute) && !(entry instanceof Alias && ((Alias) entry).child() instanceof Attribute)) {
        return false;
      }
    }
    return true;
  }

  /** `value AS column`, with the column's own id. */
  public static Alias alias(Expression value, Attribute as) {
    return new Alias(value, as.name(), as.exprId(), as.qualifier(), scala.Option.empty(), seq(new ArrayList()));
  }

  private static void collectSources(LogicalPlan plan, HashMap made) {
    if (plan instanceof Project) collect((Project) plan, made);
    // Spark puts the constant for the column into conditions, but not into what is above the filter.
    if (plan instanceof Filter) collectConstants(((Filter) plan).condition(), made);
    if (plan instanceof Join) {
      Join join = (Join) plan;
      if (keepsSide(join, true)) collectSources(join.left(), made);
      if (keepsSide(join, false)) collectSources(join.right(), made);
    } else if (plan instanceof Project || keepsValues(plan)) {
      collectSources((LogicalPlan) plan.children().head(), made);
    }
  }

  private static void collect(Project project, HashMap made) {
    Iterator entries = project.projectList().iterator();
    while (entries.hasNext()) {
      Object entry = entries.next();
      if (entry instanceof Alias && ((Alias) entry).child().deterministic()) {
        Object id = ((Alias) entry).exprId();
        if (!made.containsKey(id)) made.put(id, ((Alias) entry).child());
      }
    }
  }

  private static void collectConstants(Expression condition, HashMap made) {
    if (condition instanceof And) {
      collectConstants(((And) condition).left(), made);
      collectConstants(((And) condition).right(), made);
    } else if (condition instanceof EqualTo) {
      Expression one = ((EqualTo) condition).left();
      Expression other = ((EqualTo) condition).right();
      if (one instanceof Literal) {
        Expression swapped = one;
        one = other;
        other = swapped;
      }
      if (one instanceof Attribute && other instanceof Literal && isExact(one.dataType())
          && one.dataType().equals(other.dataType())) {
        Object id = ((Attribute) one).exprId();
        if (!made.containsKey(id)) made.put(id, other);
      }
    }
  }

  /** Are values of the type that = calls equal the same value? */
  private static boolean isExact(DataType type) {
    return type.equals(DataTypes.StringType) || type.equals(DataTypes.IntegerType) || type.equals(DataTypes.LongType)
        || type.equals(DataTypes.ShortType) || type.equals(DataTypes.ByteType) || type.equals(DataTypes.BooleanType)
        || type.equals(DataTypes.DateType);
  }

  /** An immutable Scala Seq of the list's elements. */
  public static scala.collection.immutable.Seq seq(java.util.List values) {
    return CollectionConverters.asScala(values).toIndexedSeq();
  }
}
