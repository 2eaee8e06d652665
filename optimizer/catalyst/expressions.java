// Expressions as the rules before extraction see them: calls in them, what cannot fail, what is true.
package sparkllm;

import java.util.ArrayList;
import org.apache.spark.sql.catalyst.expressions.Alias;
import org.apache.spark.sql.catalyst.expressions.And;
import org.apache.spark.sql.catalyst.expressions.Attribute;
import org.apache.spark.sql.catalyst.expressions.CaseWhen;
import org.apache.spark.sql.catalyst.expressions.Cast;
import org.apache.spark.sql.catalyst.expressions.Coalesce;
import org.apache.spark.sql.catalyst.expressions.EqualTo;
import org.apache.spark.sql.catalyst.expressions.Expression;
import org.apache.spark.sql.catalyst.expressions.If;
import org.apache.spark.sql.catalyst.expressions.In;
import org.apache.spark.sql.catalyst.expressions.IsNotNull;
import org.apache.spark.sql.catalyst.expressions.IsNull;
import org.apache.spark.sql.catalyst.expressions.Like;
import org.apache.spark.sql.catalyst.expressions.Literal;
import org.apache.spark.sql.catalyst.expressions.Not;
import org.apache.spark.sql.catalyst.expressions.Or;
import org.apache.spark.sql.catalyst.expressions.PythonUDF;
import org.apache.spark.sql.types.DataTypes;
import org.apache.spark.sql.types.StringType;
import scala.collection.Iterator;
import scala.jdk.javaapi.CollectionConverters;

/** Questions about expressions, and lists of them. */
public final class Exprs {
  public static boolean isCall(Expression expression) {
    return expression instanceof PythonUDF && "llm".equals(((PythonUDF) expression).name());
  }

  /** A call that may get a mask. The spec is JSON, in whose texts this would have a backslash. */
  public static boolean isOpen(PythonUDF udf) {
    if (!udf.udfDeterministic() || !udf.deterministic()) return false;
    return ((Literal) udf.children().apply(0)).value().toString().indexOf("\"masked\":true") < 0;
  }

  public static Expression isTrue(Expression condition) { return orElse(condition, false); }

  public static Expression isNotFalse(Expression condition) { return orElse(condition, true); }

  public static Expression orElse(Expression condition, boolean value) {
    if (!condition.nullable()) return condition;
    ArrayList both = new ArrayList();
    both.add(condition);
    both.add(Literal.create(Boolean.valueOf(value), DataTypes.BooleanType));
    return new Coalesce(seq(both));
  }

  public static ArrayList operands(Expression expression, boolean isAnd) {
    ArrayList found = new ArrayList();
    if (isAnd ? expression instanceof And : expression instanceof Or) {
      Iterator children = expression.children().iterator();
      while (children.hasNext()) found.addAll(operands((Expression) children.next(), isAnd));
    } else {
      found.add(expression);
    }
    return found;
  }

  private static final String SAFE = " Alias And CaseWhen Coalesce Concat Contains CreateArray CreateNamedStruct EndsWith"
      + " EqualNullSafe EqualTo GetStructField GreaterThan GreaterThanOrEqual If In InSet IsNaN IsNotNull IsNull"
      + " KnownNotNull Length LessThan LessThanOrEqual Literal Lower Not OctetLength Or StartsWith StringTrim"
      + " StringTrimLeft StringTrimRight StructsToJson Substring Upper ";

  /** Can the expression be evaluated for any row, without an error? Calls can, as far as this goes. */
  public static boolean isSafe(Expression expression) {
    boolean isSafe = expression instanceof Attribute || isCall(expression)
        || SAFE.indexOf(" " + expression.getClass().getSimpleName() + " ") >= 0;
    if (expression instanceof Cast) {
      isSafe = expression.dataType() instanceof StringType
          || Cast.canUpCast(((Cast) expression).child().dataType(), expression.dataType());
    } else if (expression instanceof Like) {
      Expression pattern = ((Like) expression).right();
      isSafe = pattern instanceof Literal && String.valueOf(((Literal) pattern).value()).indexOf('\\') < 0;
    }
    if (!isSafe) return false;
    Iterator children = expression.children().iterator();
    while (children.hasNext()) {
      if (!isSafe((Expression) children.next())) return false;
    }
    return true;
  }

  /** How many nodes the expression has, counted up to a limit. */
  public static int size(Expression expression, int limit) {
    int nodes = 1;
    Iterator children = expression.children().iterator();
    while (children.hasNext() && nodes < limit) nodes += size((Expression) children.next(), limit - nodes);
    return nodes;
  }

  public static ArrayList list(scala.collection.Iterable values) {
    ArrayList found = new ArrayList();
    Iterator all = values.iterator();
    while (all.hasNext()) found.add(all.next());
    return found;
  }

  public static scala.collection.immutable.IndexedSeq seq(ArrayList values) {
    return CollectionConverters.asScala(values).toIndexedSeq();
  }
}
