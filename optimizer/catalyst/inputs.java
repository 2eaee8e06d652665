// Questions about the inputs of calls in plans that the rules have finished, for whoever estimates what calls cost.
package sparkllm;

import java.util.ArrayList;
import java.util.HashMap;
import java.util.HashSet;
import org.apache.spark.sql.catalyst.expressions.Alias;
import org.apache.spark.sql.catalyst.expressions.Attribute;
import org.apache.spark.sql.catalyst.expressions.Expression;
import org.apache.spark.sql.catalyst.expressions.PythonUDF;
import org.apache.spark.sql.catalyst.plans.logical.Aggregate;
import org.apache.spark.sql.catalyst.plans.logical.ArrowEvalPython;
import org.apache.spark.sql.catalyst.plans.logical.BaseEvalPython;
import org.apache.spark.sql.catalyst.plans.logical.Filter;
import org.apache.spark.sql.catalyst.plans.logical.Generate;
import org.apache.spark.sql.catalyst.plans.logical.GlobalLimit;
import org.apache.spark.sql.catalyst.plans.logical.Join;
import org.apache.spark.sql.catalyst.plans.logical.LocalLimit;
import org.apache.spark.sql.catalyst.plans.logical.LogicalPlan;
import org.apache.spark.sql.catalyst.plans.logical.Project;
import org.apache.spark.sql.catalyst.plans.logical.Repartition;
import org.apache.spark.sql.catalyst.plans.logical.RepartitionByExpression;
import org.apache.spark.sql.catalyst.plans.logical.Sort;
import org.apache.spark.sql.catalyst.plans.logical.Window;
import scala.collection.Iterator;
import scala.jdk.javaapi.CollectionConverters;

public final class Inputs {
  /** The plan without what only moves rows or leaves columns out, ReorderRows' nodes among it. It has the same rows,
   * but may have more columns, and lack those that ReorderRows computed. */
  public LogicalPlan essence(LogicalPlan plan) {
    return essence(plan, true);
  }

  /** mayDrop: columns of ours are for a call above, and not for an Aggregate that stands between. */
  private LogicalPlan essence(LogicalPlan plan, boolean mayDrop) {
    if (isPassing(plan, mayDrop)) return essence((LogicalPlan) plan.children().head(), mayDrop);
    if (!isTransparent(plan)) return plan;
    boolean mayDropBelow = mayDrop && !(plan instanceof Aggregate);
    ArrayList children = new ArrayList();
    boolean isChanged = false;
    Iterator old = plan.children().iterator();
    while (old.hasNext()) {
      LogicalPlan child = (LogicalPlan) old.next();
      LogicalPlan found = essence(child, mayDropBelow);
      isChanged = isChanged || found != child;
      children.add(found);
    }
    if (!isChanged) return plan;
    return (LogicalPlan) plan.withNewChildren(CollectionConverters.asScala(children).toIndexedSeq());
  }

  private boolean isPassing(LogicalPlan plan, boolean mayDrop) {
    if (plan instanceof Sort) return !((Sort) plan).global();
    if (plan instanceof Repartition || plan instanceof RepartitionByExpression) return true;
    if (plan instanceof Project) {
      Iterator entries = ((Project) plan).projectList().iterator();
      while (entries.hasNext()) {
        Object entry = entries.next();
        if (!(entry instanceof Attribute) && !(mayDrop && isOurs(entry))) return false;
      }
      return true;
    }
    if (!(plan instanceof ArrowEvalPython)) return false;
    Iterator udfs = ((ArrowEvalPython) plan).udfs().iterator();
    while (udfs.hasNext()) {
      if (!"llm_place".equals(((PythonUDF) udfs.next()).name())) return false;
    }
    return true;
  }

  private boolean isOurs(Object entry) {
    return entry instanceof Alias && ((Alias) entry).name().matches("_llm\\d+");
  }

  /** Nodes whose rows do not depend on how many columns their children have. */
  private boolean isTransparent(LogicalPlan plan) {
    return plan instanceof Project || plan instanceof Filter || plan instanceof Join || plan instanceof Window
        || plan instanceof Generate || plan instanceof Aggregate || plan instanceof GlobalLimit
        || plan instanceof LocalLimit || plan instanceof Sort || plan instanceof BaseEvalPython;
  }

  /** The expression in terms of the columns that ReorderRows computed its own from. */
  public Expression unplaced(Expression expression, LogicalPlan plan) {
    HashMap made = new HashMap();
    collect(plan, made);
    return Trees.traced(expression, made);
  }

  private void collect(LogicalPlan plan, HashMap made) {
    if (plan instanceof Aggregate) return;
    if (plan instanceof Project) {
      Iterator entries = ((Project) plan).projectList().iterator();
      while (entries.hasNext()) {
        Object entry = entries.next();
        if (isOurs(entry)) made.put(((Alias) entry).exprId(), ((Alias) entry).child());
      }
    }
    Iterator children = plan.children().iterator();
    while (children.hasNext()) collect((LogicalPlan) children.next(), made);
  }

  /** Does a filter in the plan drop rows by what a Python function below it answers? */
  public boolean dropsByAnswers(LogicalPlan plan) {
    return drops(plan, new HashSet());
  }

  private boolean drops(LogicalPlan plan, HashSet answers) {
    Iterator children = plan.children().iterator();
    while (children.hasNext()) {
      if (drops((LogicalPlan) children.next(), answers)) return true;
    }
    if (plan instanceof BaseEvalPython) {
      Iterator results = ((BaseEvalPython) plan).resultAttrs().iterator();
      while (results.hasNext()) answers.add(((Attribute) results.next()).exprId());
    } else if (plan instanceof Project) {
      Iterator entries = ((Project) plan).projectList().iterator();
      while (entries.hasNext()) {
        Object entry = entries.next();
        if (entry instanceof Alias && uses((Alias) entry, answers)) answers.add(((Alias) entry).exprId());
      }
    }
    return plan instanceof Filter && uses(((Filter) plan).condition(), answers);
  }

  private boolean uses(Expression expression, HashSet answers) {
    Iterator columns = expression.references().iterator();
    while (columns.hasNext()) {
      if (answers.contains(((Attribute) columns.next()).exprId())) return true;
    }
    return false;
  }
}
