// The JVM half of the bridge (bridge.py compiles it with Spark's own Janino: raw types, no lambdas).
// What it is: the plan questions that would take hundreds of round trips from Python. What asks Python is in
// callbacks.java.
package sparkllm;

import java.util.HashMap;
import org.apache.spark.Dependency;
import org.apache.spark.rdd.RDD;
import org.apache.spark.sql.catalyst.expressions.And;
import org.apache.spark.sql.catalyst.expressions.Attribute;
import org.apache.spark.sql.catalyst.expressions.ConditionalExpression;
import org.apache.spark.sql.catalyst.expressions.EqualTo;
import org.apache.spark.sql.catalyst.expressions.Expression;
import org.apache.spark.sql.catalyst.expressions.In;
import org.apache.spark.sql.catalyst.expressions.IsNotNull;
import org.apache.spark.sql.catalyst.expressions.Or;
import org.apache.spark.sql.catalyst.expressions.PythonUDF;
import org.apache.spark.sql.catalyst.expressions.SubqueryExpression;
import org.apache.spark.sql.catalyst.expressions.aggregate.AggregateExpression;
import org.apache.spark.sql.catalyst.expressions.aggregate.AggregateFunction;
import org.apache.spark.sql.catalyst.plans.logical.ArrowEvalPython;
import org.apache.spark.sql.catalyst.plans.logical.Filter;
import org.apache.spark.sql.catalyst.plans.logical.Join;
import org.apache.spark.sql.catalyst.plans.logical.LogicalPlan;
import org.apache.spark.sql.catalyst.trees.TreePattern;
import org.apache.spark.sql.execution.LogicalRDD;
import org.apache.spark.sql.execution.columnar.InMemoryRelation;
import org.apache.spark.sql.execution.datasources.HadoopFsRelation;
import org.apache.spark.sql.execution.datasources.LogicalRelation;
import scala.collection.Iterator;

/** Questions about logical plans. */
public final class Plans {
  public boolean holdsCall(LogicalPlan plan) {
    if (!plan.containsPattern(TreePattern.EVAL_PYTHON_UDF())) return false;
    if (isCall(plan) || isLeftAggregate(plan)) return true;
    Iterator children = plan.children().iterator();
    while (children.hasNext()) {
      if (holdsCall((LogicalPlan) children.next())) return true;
    }
    return false;
  }

  /** Is this node an ArrowEvalPython of an aggregate over answers, which its rule has not seen? */
  public boolean isLeftAggregate(LogicalPlan plan) {
    return plan instanceof ArrowEvalPython
        && "llm_aggregate".equals(((PythonUDF) ((ArrowEvalPython) plan).udfs().head()).name());
  }

  /** Is this node an ArrowEvalPython of llm() calls? */
  public boolean isCall(LogicalPlan plan) {
    if (!(plan instanceof ArrowEvalPython)) return false;
    Iterator udfs = ((ArrowEvalPython) plan).udfs().iterator();
    while (udfs.hasNext()) {
      String name = ((PythonUDF) udfs.next()).name();
      if (!"llm".equals(name) && !"llm_group".equals(name)) return false;
    }
    return true;
  }

  /** Does the plan hold a call that an early rule may have something to do with: one whose value some rows may not need,
   * one in a join's condition, or an aggregate over answers? */
  public boolean holdsOpenCall(LogicalPlan plan) {
    if (!plan.containsPattern(TreePattern.PYTHON_UDF())) return false;
    Iterator expressions = plan.expressions().iterator();
    while (expressions.hasNext()) {
      if (holdsOpenCall((Expression) expressions.next(), plan instanceof Join)) return true;
    }
    Iterator children = plan.children().iterator();
    while (children.hasNext()) {
      if (holdsOpenCall((LogicalPlan) children.next())) return true;
    }
    return false;
  }

  private boolean holdsOpenCall(Expression expression, boolean isConditional) {
    if (!expression.containsPattern(TreePattern.PYTHON_UDF())) return false;
    if (expression instanceof PythonUDF && isConditional && "llm".equals(((PythonUDF) expression).name())) return true;
    if (expression instanceof PythonUDF && "llm_aggregate".equals(((PythonUDF) expression).name())) return true;
    boolean inside = isConditional || expression instanceof ConditionalExpression || expression instanceof And
        || expression instanceof Or || expression instanceof In || expression instanceof SubqueryExpression
        || (expression instanceof AggregateExpression && ((AggregateExpression) expression).filter().isDefined());
    Iterator children = expression.children().iterator();
    while (children.hasNext()) {
      if (holdsOpenCall((Expression) children.next(), inside)) return true;
    }
    return false;
  }

  /** Does the plan hold Python functions that are evaluated, of whatever kind? */
  public boolean holdsPython(LogicalPlan plan) {
    return plan.containsPattern(TreePattern.EVAL_PYTHON_UDF()) || plan.containsPattern(TreePattern.PYTHON_UDF());
  }

  /** Does the plan hold a function of the user's, in Python or for the JVM? */
  public boolean hasUdf(LogicalPlan plan) {
    return holdsPython(plan) || plan.containsPattern(TreePattern.SCALA_UDF());
  }

  /** Does the plan give the columns that the expression needs? */
  public boolean hasInput(Expression expression, LogicalPlan plan) {
    return expression.references().subsetOf(plan.outputSet());
  }

  /** Is the leaf a table of files? */
  public boolean isFileRelation(LogicalPlan plan) {
    return plan instanceof LogicalRelation && ((LogicalRelation) plan).relation() instanceof HadoopFsRelation;
  }

  /** Is the leaf a cached table whose rows are there, to be read and not to be computed by a user's function again? */
  public boolean isFilledCache(LogicalPlan plan) {
    if (!(plan instanceof InMemoryRelation)) return false;
    InMemoryRelation cached = (InMemoryRelation) plan;
    if (!cached.cacheBuilder().isCachedColumnBuffersLoaded()) return false;
    return cached.cacheBuilder().storageLevel().useDisk() || !hasUdf(cached.cacheBuilder().logicalPlan());
  }

  /** Does the leaf's RDD hold rows that the driver handed out? Python may have converted them, but made nothing anew. */
  public boolean isLocalRdd(LogicalPlan plan) {
    return plan instanceof LogicalRDD && isLocal(((LogicalRDD) plan).rdd());
  }

  private boolean isLocal(RDD rdd) {
    Iterator parents = rdd.dependencies().iterator();
    if (rdd.getClass().getSimpleName().contains("Python")) {
      return parents.hasNext() && isParallelized(((Dependency) parents.next()).rdd());
    }
    if (!parents.hasNext()) return isParallelized(rdd);
    while (parents.hasNext()) {
      if (!isLocal(((Dependency) parents.next()).rdd())) return false;
    }
    return true;
  }

  private boolean isParallelized(RDD rdd) {
    return "ParallelCollectionRDD".equals(rdd.getClass().getSimpleName());
  }

  /** Does the join compare a column of one side with one of the other? */
  public boolean hasEquality(LogicalPlan plan) {
    Join join = (Join) plan;
    if (join.condition().isEmpty()) return false;
    return hasEquality((Expression) join.condition().get(), join.left(), join.right());
  }

  private boolean hasEquality(Expression condition, LogicalPlan left, LogicalPlan right) {
    Iterator children = condition.children().iterator();
    if (condition instanceof And) {
      while (children.hasNext()) {
        if (hasEquality((Expression) children.next(), left, right)) return true;
      }
      return false;
    }
    if (!(condition instanceof EqualTo)) return false;
    Expression one = (Expression) children.next();
    Expression other = (Expression) children.next();
    return (hasInput(one, left) && hasInput(other, right)) || (hasInput(one, right) && hasInput(other, left));
  }

  public boolean onlyDropsNulls(LogicalPlan plan) {
    return plan instanceof Filter && onlyNotNull(((Filter) plan).condition());
  }

  private boolean onlyNotNull(Expression condition) {
    if (!(condition instanceof And)) return condition instanceof IsNotNull;
    Iterator children = condition.children().iterator();
    while (children.hasNext()) {
      if (!onlyNotNull((Expression) children.next())) return false;
    }
    return true;
  }

  /** The expression ids of the columns that a join's condition says are equal: "3=7 4=9". */
  public String equalColumns(LogicalPlan plan) {
    Join join = (Join) plan;
    StringBuilder pairs = new StringBuilder();
    if (join.condition().isDefined()) equalColumns((Expression) join.condition().get(), pairs);
    return pairs.toString();
  }

  private void equalColumns(Expression condition, StringBuilder pairs) {
    Iterator children = condition.children().iterator();
    if (condition instanceof And) {
      while (children.hasNext()) equalColumns((Expression) children.next(), pairs);
    } else if (condition instanceof EqualTo) {
      Expression one = (Expression) children.next();
      Expression other = (Expression) children.next();
      if (one instanceof Attribute && other instanceof Attribute) {
        pairs.append(((Attribute) one).exprId().id()).append('=').append(((Attribute) other).exprId().id()).append(' ');
      }
    }
  }

  /** The expression with columns replaced by what the Projects of the plan make them of, if not at random. */
  public Expression traced(Expression expression, LogicalPlan plan) {
    HashMap made = new HashMap();
    collectAliases(plan, made);
    return Trees.traced(expression, made);
  }

  private void collectAliases(LogicalPlan plan, HashMap made) {
    Trees.collectAliases(plan, made);
    Iterator children = plan.children().iterator();
    while (children.hasNext()) collectAliases((LogicalPlan) children.next(), made);
  }

  /** For each expression the number of the first that is equal to it, -1 for constants: "0 1 0 -1". */
  public String numbered(scala.collection.immutable.Seq expressions) {
    java.util.HashMap known = new java.util.HashMap();
    StringBuilder numbers = new StringBuilder();
    for (int i = 0; i < expressions.size(); i++) {
      Expression expression = (Expression) expressions.apply(i);
      Object number = Integer.valueOf(-1);
      if (!expression.foldable()) {
        Object canonical = expression.deterministic() ? (Object) expression.canonicalized() : (Object) Integer.valueOf(i);
        if (!known.containsKey(canonical)) known.put(canonical, Integer.valueOf(i));
        number = known.get(canonical);
      }
      numbers.append(number).append(' ');
    }
    return numbers.toString();
  }

  /** The partitions of a leaf that knows them, else -1. */
  public int partitions(LogicalPlan leaf) {
    return leaf instanceof LogicalRDD ? ((LogicalRDD) leaf).rdd().getNumPartitions() : -1;
  }

  /** Are the node's own expressions deterministic, whatever its children are? */
  public boolean isDeterministic(LogicalPlan plan) {
    Iterator expressions = plan.expressions().iterator();
    while (expressions.hasNext()) {
      if (!((Expression) expressions.next()).deterministic()) return false;
    }
    return true;
  }

  /** The class names of the aggregate functions in the node's own expressions, each with a space behind it. */
  public String aggregateFunctions(LogicalPlan plan) {
    StringBuilder names = new StringBuilder();
    Iterator expressions = plan.expressions().iterator();
    while (expressions.hasNext()) aggregateFunctions((Expression) expressions.next(), names);
    return names.toString();
  }

  private void aggregateFunctions(Expression expression, StringBuilder names) {
    if (expression instanceof AggregateFunction) names.append(expression.getClass().getSimpleName()).append(' ');
    Iterator children = expression.children().iterator();
    while (children.hasNext()) aggregateFunctions((Expression) children.next(), names);
  }

  /** Why `after` cannot stand for `before`, or null: a wrong plan rarely throws. */
  public String problem(LogicalPlan before, LogicalPlan after) {
    if (!before.output().equals(after.output())) {
      return "the output changes from " + before.output() + " to " + after.output();
    }
    if (!after.resolved()) return "the plan is not resolved";
    return missing(after);
  }

  private String missing(LogicalPlan plan) {
    if (!plan.missingInput().isEmpty()) return plan.nodeName() + " misses the input " + plan.missingInput();
    Iterator children = plan.children().iterator();
    while (children.hasNext()) {
      String found = missing((LogicalPlan) children.next());
      if (found != null) return found;
    }
    return null;
  }
}
