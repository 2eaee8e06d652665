// Aggregate functions taken apart and put together again, for rules that aggregate in two steps (aggregate_distinct.py).
package sparkllm;

import java.util.ArrayList;
import java.util.HashMap;
import java.util.LinkedHashSet;
import org.apache.spark.sql.catalyst.expressions.And;
import org.apache.spark.sql.catalyst.expressions.Cast;
import org.apache.spark.sql.catalyst.expressions.Coalesce;
import org.apache.spark.sql.catalyst.expressions.Divide;
import org.apache.spark.sql.catalyst.expressions.EqualTo;
import org.apache.spark.sql.catalyst.expressions.Expression;
import org.apache.spark.sql.catalyst.expressions.If;
import org.apache.spark.sql.catalyst.expressions.IsNotNull;
import org.apache.spark.sql.catalyst.expressions.Literal;
import org.apache.spark.sql.catalyst.expressions.Multiply;
import org.apache.spark.sql.catalyst.expressions.aggregate.AggregateExpression;
import org.apache.spark.sql.catalyst.expressions.aggregate.AggregateFunction;
import org.apache.spark.sql.catalyst.expressions.aggregate.Count;
import org.apache.spark.sql.catalyst.expressions.aggregate.Sum;
import org.apache.spark.sql.catalyst.plans.logical.Aggregate;
import org.apache.spark.sql.catalyst.plans.logical.LogicalPlan;
import org.apache.spark.sql.types.DataType;
import org.apache.spark.sql.types.DataTypes;
import scala.Option;
import scala.collection.Iterator;
import scala.collection.immutable.Seq;
import scala.jdk.javaapi.CollectionConverters;

public final class Aggregates {
  /** The aggregate functions of an Aggregate's result, each once: AggregateExpressions. */
  public Seq functions(LogicalPlan plan) {
    LinkedHashSet found = new LinkedHashSet();
    Iterator entries = ((Aggregate) plan).aggregateExpressions().iterator();
    while (entries.hasNext()) collect((Expression) entries.next(), found);
    return CollectionConverters.asScala(new ArrayList(found)).toIndexedSeq();
  }

  private void collect(Expression expression, LinkedHashSet found) {
    if (expression instanceof AggregateExpression) {
      found.add(expression);
      return;
    }
    Iterator children = expression.children().iterator();
    while (children.hasNext()) collect((Expression) children.next(), found);
  }

  /** What the Aggregate gives, with `news` instead of its functions `olds`. */
  public Seq replaced(LogicalPlan plan, Seq olds, Seq news) {
    HashMap made = new HashMap();
    for (int i = 0; i < olds.size(); i++) made.put(olds.apply(i), news.apply(i));
    ArrayList changed = new ArrayList();
    Iterator entries = ((Aggregate) plan).aggregateExpressions().iterator();
    while (entries.hasNext()) changed.add(Trees.replaced((Expression) entries.next(), made));
    return CollectionConverters.asScala(changed).toIndexedSeq();
  }

  public LogicalPlan aggregate(Seq grouping, Seq result, LogicalPlan child) {
    return new Aggregate(grouping, result, child, Option.empty());
  }

  /** The function of `old` over other arguments, with a filter or without (null). */
  public Expression over(AggregateExpression old, Seq arguments, Expression filter) {
    AggregateFunction function = (AggregateFunction) ((Expression) old.aggregateFunction()).withNewChildren(arguments);
    return function.toAggregateExpression(old.isDistinct(), Option.apply(filter));
  }

  public Expression sum(Expression value, Expression filter) {
    return new Sum(value).toAggregateExpression(false, Option.apply(filter));
  }

  public Expression count(Expression value, Expression filter) {
    ArrayList one = new ArrayList();
    one.add(value);
    return new Count(CollectionConverters.asScala(one).toIndexedSeq()).toAggregateExpression(false, Option.apply(filter));
  }

  /** `value`, a BIGINT, or 0 where it is NULL. */
  public Expression orZero(Expression value) {
    ArrayList both = new ArrayList();
    both.add(value);
    both.add(zero());
    return new Coalesce(CollectionConverters.asScala(both).toIndexedSeq());
  }

  /** `count`, or 0 where one of the values is NULL. */
  public Expression countIf(Seq values, Expression count) {
    Expression condition = null;
    for (int i = 0; i < values.size(); i++) {
      Expression isKnown = new IsNotNull((Expression) values.apply(i));
      condition = condition == null ? isKnown : new And(condition, isKnown);
    }
    return new If(condition, count, zero());
  }

  /** A whole number as often as `count` says, as BIGINT. */
  public Expression times(Expression value, Expression count) { return new Multiply(cast(value, DataTypes.LongType), count); }

  /** sum / count as avg() has it: DOUBLE, NULL where nothing was counted. */
  public Expression quotient(Expression sum, Expression count) {
    Expression none = Literal.create(null, DataTypes.DoubleType);
    Expression ratio = new Divide(cast(sum, DataTypes.DoubleType), cast(count, DataTypes.DoubleType));
    return new If(new EqualTo(count, zero()), none, ratio);
  }

  public Expression cast(Expression value, DataType type) {
    return value.dataType().equals(type) ? value : new Cast(value, type, Option.empty(),
        org.apache.spark.sql.catalyst.expressions.EvalMode.fromSQLConf(org.apache.spark.sql.internal.SQLConf.get()));
  }

  private Expression zero() { return Literal.create(Long.valueOf(0L), DataTypes.LongType); }

  /** Does the function answer overflow with NULL (try_sum)? Its second element says so, the mode or what holds it: Spark
   * versions differ in that. */
  public boolean isTry(AggregateExpression function) {
    Object sum = function.aggregateFunction();
    return sum instanceof Sum && ((Sum) sum).productElement(1).toString().contains("TRY");
  }
}
