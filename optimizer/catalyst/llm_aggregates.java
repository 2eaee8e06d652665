// Aggregates over answers (rules/llm_aggregates.py): where they stand in a plan, and plans written as SQL over a plan.
package sparkllm;

import java.util.ArrayList;
import java.util.HashMap;
import java.util.HashSet;
import org.apache.spark.sql.catalyst.QueryPlanningTracker;
import org.apache.spark.sql.catalyst.analysis.EliminateSubqueryAliases;
import org.apache.spark.sql.catalyst.analysis.UnresolvedRelation;
import org.apache.spark.sql.catalyst.expressions.Attribute;
import org.apache.spark.sql.catalyst.expressions.Expression;
import org.apache.spark.sql.catalyst.expressions.Literal;
import org.apache.spark.sql.catalyst.expressions.PythonUDF;
import org.apache.spark.sql.catalyst.expressions.aggregate.AggregateExpression;
import org.apache.spark.sql.catalyst.expressions.aggregate.CollectList;
import org.apache.spark.sql.catalyst.optimizer.ReplaceExpressions;
import org.apache.spark.sql.catalyst.plans.logical.Aggregate;
import org.apache.spark.sql.catalyst.plans.logical.Join;
import org.apache.spark.sql.catalyst.plans.logical.LocalRelation;
import org.apache.spark.sql.catalyst.plans.logical.LogicalPlan;
import org.apache.spark.sql.catalyst.trees.TreePattern;
import org.apache.spark.sql.classic.SparkSession;
import org.apache.spark.sql.types.ArrayType;
import org.apache.spark.sql.types.BinaryType;
import org.apache.spark.sql.types.DataType;
import org.apache.spark.sql.types.MapType;
import org.apache.spark.sql.types.StringType;
import org.apache.spark.sql.types.StructType;
import scala.Option;
import scala.collection.Iterator;
import scala.collection.immutable.Seq;

/** An aggregate function that only stands for calls: Spark's own in where it may stand, not in its type and its name. */
public final class Answers extends CollectList {
  private final String call;
  private final String arguments;
  private final DataType type;
  private final boolean isNullable;

  public Answers(Expression input, String call, String arguments, DataType type, boolean isNullable) {
    super(input);
    this.call = call;
    this.arguments = arguments;
    this.type = type;
    this.isNullable = isNullable;
  }

  public DataType dataType() { return type; }

  public boolean nullable() { return isNullable; }

  /** Of a group without rows, as correlated subqueries have them. */
  public Option defaultResult() { return isNullable ? Option.empty() : super.defaultResult(); }

  public String prettyName() { return call; }

  public String sql(boolean isDistinct) { return call + (isDistinct ? "(DISTINCT " : "(") + arguments + ")"; }

  Answers shown(String arguments) { return new Answers(child(), call, arguments, type, isNullable); }

  public CollectList withNewChildInternal(Expression input) {
    return new Answers(input, call, arguments, type, isNullable);
  }
}

/** Questions about plans with them. */
public final class LlmAggregates {
  private static final String INPUT = "llm_aggregate"; // as spark_llm.aggregate names it
  private static final String KEEPING = " Aggregate Distinct Except Expand Filter GlobalLimit Intersect Join LocalLimit Offset"
      + " Project RebalancePartitions Repartition RepartitionByExpression Sample Sort SubqueryAlias Union Window"
      + " WindowGroupLimit WithCTE CTERelationDef ";

  private static final String SHORTENING = " Alias CaseWhen Cast Coalesce Concat GetArrayItem GetMapValue GetStructField If"
      + " KnownNotNull Lower StringTrim StringTrimLeft StringTrimRight Substring Upper ";
  private static final int LONGEST_CONSTANT = 64;

  /** The function of this name over a PythonUDF (spec, text). */
  public Expression function(Expression input, String call, DataType type, boolean isNullable) {
    return new Answers(input, call, "", type, isNullable);
  }

  /** The function with its arguments as the name of a column shows them. */
  public Expression shown(Expression function, String arguments) { return ((Answers) function).shown(arguments); }

  public static boolean isInput(Expression expression) {
    return expression instanceof PythonUDF && INPUT.equals(((PythonUDF) expression).name());
  }

  /** Does the plan hold an aggregate over answers? */
  public boolean holds(LogicalPlan plan) {
    if (!plan.containsPattern(TreePattern.PYTHON_UDF())) return false;
    if (holdsItself(plan)) return true;
    Iterator children = plan.children().iterator();
    while (children.hasNext()) {
      if (holds((LogicalPlan) children.next())) return true;
    }
    return false;
  }

  /** Is this very node an Aggregate with one? */
  public boolean isOne(LogicalPlan plan) { return plan instanceof Aggregate && holdsItself(plan); }

  private boolean holdsItself(LogicalPlan plan) {
    Iterator expressions = plan.expressions().iterator();
    while (expressions.hasNext()) {
      if (holds((Expression) expressions.next())) return true;
    }
    return false;
  }

  public boolean holds(Expression expression) {
    if (!expression.containsPattern(TreePattern.PYTHON_UDF())) return false;
    if (isInput(expression)) return true;
    Iterator children = expression.children().iterator();
    while (children.hasNext()) {
      if (holds((Expression) children.next())) return true;
    }
    return false;
  }

  /** The input of one of the plan's aggregates over answers, of which it must hold one. */
  public Expression anyIn(LogicalPlan plan) {
    Iterator expressions = plan.expressions().iterator();
    while (expressions.hasNext()) {
      Expression found = (Expression) expressions.next();
      if (holds(found)) return anyIn(found);
    }
    Iterator children = plan.children().iterator();
    while (children.hasNext()) {
      LogicalPlan found = (LogicalPlan) children.next();
      if (holds(found)) return anyIn(found);
    }
    throw new IllegalArgumentException("no aggregate over answers in " + plan.nodeName());
  }

  private Expression anyIn(Expression expression) {
    Iterator children = expression.children().iterator();
    while (!isInput(expression)) {
      Expression found = (Expression) children.next();
      if (holds(found)) return anyIn(found);
    }
    return expression;
  }

  /** What the aggregate expression has for its input, if that is a PythonUDF (spec, text) of ours, else null. */
  public Expression input(Expression aggregate) {
    Expression first = (Expression) ((AggregateExpression) aggregate).aggregateFunction().children().head();
    return isInput(first) ? first : null;
  }

  /** Most bytes that the plan's rows can have in the files and tables they come from, by what Spark knows of these;
   * infinite where something stands between that may make much of little. A Project's own estimate is none: to it a
   * text is as long as two numbers. */
  public double sourceBytes(LogicalPlan plan) {
    if (plan.children().isEmpty()) return plan.stats().sizeInBytes().doubleValue();
    if (KEEPING.indexOf(" " + plan.nodeName() + " ") < 0 || asksPython(plan)) return Double.POSITIVE_INFINITY;
    Iterator children = plan.children().iterator();
    double bytes = sourceBytes((LogicalPlan) children.next());
    while (children.hasNext()) {
      double more = sourceBytes((LogicalPlan) children.next());
      bytes = !(plan instanceof Join) ? bytes + more : isOfLeft((Join) plan) ? bytes : bytes * Math.max(1, more);
    }
    return bytes;
  }

  /** The same of a text over the plan's columns; infinite where the text may be much longer than what it is made of. */
  public double sourceBytes(LogicalPlan plan, Expression text) {
    Expression made = new Plans().traced(text, plan);
    return keeps(made, new HashSet()) ? sourceBytes(plan) : Double.POSITIVE_INFINITY;
  }

  /** Is the value about as long as the columns in it, none of which stands there twice? */
  private static boolean keeps(Expression value, HashSet columns) {
    if (!isLong(value.dataType())) return true;
    if (value instanceof Attribute) return columns.add(((Attribute) value).exprId());
    if (value instanceof Literal) return String.valueOf(((Literal) value).value()).length() <= LONGEST_CONSTANT;
    if (SHORTENING.indexOf(" " + value.getClass().getSimpleName() + " ") < 0) return false;
    Iterator children = value.children().iterator();
    while (children.hasNext()) {
      if (!keeps((Expression) children.next(), columns)) return false;
    }
    return true;
  }

  private static boolean isLong(DataType type) {
    return type instanceof StringType || type instanceof BinaryType || type instanceof ArrayType || type instanceof MapType
        || type instanceof StructType;
  }

  /** Are there Python functions in the node's own expressions, which a text may come from? */
  private static boolean asksPython(LogicalPlan plan) {
    Iterator expressions = plan.expressions().iterator();
    while (expressions.hasNext()) {
      if (((Expression) expressions.next()).containsPattern(TreePattern.PYTHON_UDF())) return true;
    }
    return false;
  }

  private static boolean isOfLeft(Join join) {
    return join.joinType().sql().equals("LEFT SEMI") || join.joinType().sql().equals("LEFT ANTI");
  }

  /** Most rows that the plan can have, -1 where Spark does not know. */
  public long mostRows(LogicalPlan plan) {
    return plan.maxRows().isDefined() ? ((Number) plan.maxRows().get()).longValue() : -1;
  }

  /** The results with these attributes in place of those with the same ids, whose names are long. */
  public Seq renamed(Seq results, Seq attributes) {
    HashMap made = new HashMap();
    for (int i = 0; i < attributes.size(); i++) made.put(((Attribute) attributes.apply(i)).exprId(), attributes.apply(i));
    ArrayList found = new ArrayList();
    for (int i = 0; i < results.size(); i++) found.add(Trees.replaced((Expression) results.apply(i), made));
    return Trees.seq(found);
  }

  /** The resolved plan of a query over the one table `input`, whose columns are called as `columns`, its attributes. */
  public LogicalPlan planned(SparkSession session, String sql, LogicalPlan input, Seq columns) throws Exception {
    LogicalPlan leaf = new LocalRelation(columns, Trees.seq(new ArrayList()), false, Option.empty());
    LogicalPlan parsed = replaced((LogicalPlan) session.sessionState().sqlParser().parsePlan(sql), null, leaf);
    LogicalPlan plan = session.sessionState().analyzer().executeAndCheck(parsed, new QueryPlanningTracker(Option.empty()));
    plan = ReplaceExpressions.apply(EliminateSubqueryAliases.apply(plan)); // the optimizer is past these
    return replaced(plan, leaf, input);
  }

  /** old: null is whatever table the query names. */
  private LogicalPlan replaced(LogicalPlan plan, LogicalPlan old, LogicalPlan found) {
    if (old == null ? plan instanceof UnresolvedRelation : plan.equals(old)) return found;
    ArrayList children = new ArrayList();
    Iterator before = plan.children().iterator();
    while (before.hasNext()) children.add(replaced((LogicalPlan) before.next(), old, found));
    return (LogicalPlan) plan.withNewChildren(Trees.seq(children));
  }
}
