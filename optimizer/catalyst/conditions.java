// Filters over the answers of calls as conditions that tasks can evaluate (spark_llm/condition.py), in one round trip.
package sparkllm;

import java.util.ArrayList;
import java.util.HashMap;
import java.util.TreeSet;
import org.apache.spark.sql.catalyst.expressions.*;
import org.apache.spark.sql.catalyst.plans.logical.LogicalPlan;
import org.apache.spark.sql.types.DataType;
import org.apache.spark.sql.types.DataTypes;
import org.apache.spark.unsafe.types.UTF8String;
import scala.collection.Iterator;

/** Translates Catalyst's predicates; what it does not know has no translation. */
public final class Conditions {
  /**
   * The conjuncts of a condition that stands above `top`. Of each: itself; itself in terms of the output of `bottom`,
   * a node below `top` with one child each between; its translation, JSON text, or null; the numbers of the answers in
   * it, "0 2"; whether `bottom` has all that it needs.
   */
  public ArrayList conjuncts(Expression condition, LogicalPlan top, LogicalPlan bottom, scala.collection.immutable.Seq answers) {
    ArrayList found = new ArrayList();
    HashMap made = aliases(top, bottom);
    conjuncts(condition, made, bottom, answers, found);
    return found;
  }

  private void conjuncts(Expression condition, HashMap made, LogicalPlan bottom, scala.collection.immutable.Seq answers, ArrayList found) {
    if (condition instanceof And) {
      conjuncts(((And) condition).left(), made, bottom, answers, found);
      conjuncts(((And) condition).right(), made, bottom, answers, found);
      return;
    }
    Expression below = Trees.traced(condition, made);
    TreeSet numbers = new TreeSet();
    numbersOf(below, answers, numbers);
    StringBuilder text = new StringBuilder();
    java.util.Iterator each = numbers.iterator();
    while (each.hasNext()) text.append(each.next()).append(' ');
    boolean isCheap = numbers.isEmpty() && below.deterministic() && below.references().subsetOf(bottom.outputSet());
    found.add(new Object[] {condition, below, below.deterministic() ? tree(below, answers) : null, text.toString(),
        Boolean.valueOf(isCheap)});
  }

  /** The expression, which stands above `top`, in terms of the output of `bottom`, a node below. */
  public Expression below(Expression expression, LogicalPlan top, LogicalPlan bottom) {
    return Trees.traced(expression, aliases(top, bottom));
  }

  private HashMap aliases(LogicalPlan top, LogicalPlan bottom) {
    HashMap made = new HashMap();
    LogicalPlan node = top;
    while (node != bottom && node.children().size() == 1) {
      Trees.collectAliases(node, made);
      node = (LogicalPlan) node.children().head();
    }
    return made;
  }

  private int numberOf(Expression expression, scala.collection.immutable.Seq answers) {
    for (int i = 0; i < answers.size(); i++) {
      if (expression.semanticEquals((Expression) answers.apply(i))) return i;
    }
    return -1;
  }

  private void numbersOf(Expression expression, scala.collection.immutable.Seq answers, TreeSet found) {
    int number = numberOf(expression, answers);
    if (number >= 0) {
      found.add(Integer.valueOf(number));
      return;
    }
    Iterator children = expression.children().iterator();
    while (children.hasNext()) numbersOf((Expression) children.next(), answers, found);
  }

  private static boolean isText(Expression expression) {
    return DataTypes.StringType.equals(expression.dataType());
  }

  /** The tree of an expression as JSON, or null. */
  private String tree(Expression expression, scala.collection.immutable.Seq answers) {
    int number = numberOf(expression, answers);
    if (number >= 0) return isText(expression) ? "[\"answer\"," + number + "]" : null;
    if (expression instanceof Literal) {
      String value = value(((Literal) expression).value(), expression.dataType());
      return value == null ? null : "[\"literal\"," + value + "]";
    }
    if (expression instanceof Like) return like((Like) expression, answers);
    if (expression instanceof In) return in((In) expression, answers);
    if (expression instanceof InSet) return inSet((InSet) expression, answers);
    if (expression instanceof Cast) return cast((Cast) expression, answers);
    if (expression instanceof GetStructField) return field((GetStructField) expression, answers);
    if (expression instanceof StringTrim && ((StringTrim) expression).trimStr().isDefined()) return null;
    String word = word(expression);
    if (word == null) return null;
    StringBuilder text = new StringBuilder("[\"").append(word).append('"');
    Iterator children = expression.children().iterator();
    while (children.hasNext()) {
      Expression child = (Expression) children.next();
      // Collations, and types that the evaluator has no values of, do not come through here.
      if (!isKnown(child.dataType())) return null;
      String part = tree(child, answers);
      if (part == null) return null;
      text.append(',').append(part);
    }
    return text.append(']').toString();
  }

  private static String word(Expression expression) {
    if (expression instanceof EqualTo) return "=";
    if (expression instanceof EqualNullSafe) return "<=>";
    if (expression instanceof LessThan) return "<";
    if (expression instanceof LessThanOrEqual) return "<=";
    if (expression instanceof GreaterThan) return ">";
    if (expression instanceof GreaterThanOrEqual) return ">=";
    if (expression instanceof And) return "and";
    if (expression instanceof Or) return "or";
    if (expression instanceof Not) return "not";
    if (expression instanceof IsNull) return "isnull";
    if (expression instanceof IsNotNull) return "isnotnull";
    if (expression instanceof Lower) return "lower";
    if (expression instanceof Upper) return "upper";
    if (expression instanceof StringTrim) return "trim";
    if (expression instanceof StartsWith) return "startswith";
    if (expression instanceof EndsWith) return "endswith";
    if (expression instanceof Contains) return "contains";
    if (expression instanceof Length) return "length";
    return null;
  }

  private static boolean isKnown(DataType type) {
    return DataTypes.StringType.equals(type) || DataTypes.BooleanType.equals(type) || DataTypes.IntegerType.equals(type)
        || DataTypes.LongType.equals(type) || DataTypes.DoubleType.equals(type) || DataTypes.NullType.equals(type);
  }

  private String like(Like like, scala.collection.immutable.Seq answers) {
    if (!isText(like.left()) || !(like.right() instanceof Literal) || !isText(like.right())) return null;
    String pattern = value(((Literal) like.right()).value(), like.right().dataType());
    String child = tree(like.left(), answers);
    if (child == null || pattern == null || "null".equals(pattern)) return null;
    return "[\"like\"," + child + "," + pattern + "," + quoted(String.valueOf(like.escapeChar())) + "]";
  }

  private String in(In in, scala.collection.immutable.Seq answers) {
    String child = isKnown(in.value().dataType()) ? tree(in.value(), answers) : null;
    if (child == null) return null;
    StringBuilder text = new StringBuilder("[\"in\",").append(child).append(",[");
    Iterator values = in.list().iterator();
    for (boolean isFirst = true; values.hasNext(); isFirst = false) {
      Expression each = (Expression) values.next();
      if (!(each instanceof Literal)) return null;
      String value = value(((Literal) each).value(), each.dataType());
      if (value == null) return null;
      if (!isFirst) text.append(',');
      text.append(value);
    }
    return text.append("]]").toString();
  }

  private String inSet(InSet in, scala.collection.immutable.Seq answers) {
    String child = isKnown(in.child().dataType()) ? tree(in.child(), answers) : null;
    if (child == null) return null;
    TreeSet found = new TreeSet();  // a set has no order of its own
    Iterator values = in.hset().iterator();
    while (values.hasNext()) {
      String value = value(values.next(), in.child().dataType());
      if (value == null) return null;
      found.add(value);
    }
    return "[\"in\"," + child + "," + found.toString() + "]";
  }

  /** A value of a typed answer, `from_json(answer).a.b`: the answer, the names, the type. */
  private String field(GetStructField field, scala.collection.immutable.Seq answers) {
    String word = word(field.dataType());
    StringBuilder path = new StringBuilder();
    Expression below = field;
    while (below instanceof GetStructField) {
      GetStructField step = (GetStructField) below;
      String name = step.childSchema().fields()[step.ordinal()].name();
      path.insert(0, "," + quoted(name));
      below = step.child();
    }
    if (word == null || !(below instanceof JsonToStructs)) return null;
    int number = numberOf(((JsonToStructs) below).child(), answers);
    if (number < 0) return null;
    return "[\"json\",[\"answer\"," + number + "],[" + path.substring(1) + "],\"" + word + "\"]";
  }

  private static String word(DataType type) {
    return DataTypes.IntegerType.equals(type) ? "int" : DataTypes.LongType.equals(type) ? "bigint"
        : DataTypes.DoubleType.equals(type) ? "double" : DataTypes.BooleanType.equals(type) ? "boolean"
        : DataTypes.StringType.equals(type) ? "string" : null;
  }

  private String cast(Cast cast, scala.collection.immutable.Seq answers) {
    String word = word(cast.dataType());
    String child = word != null && isKnown(cast.child().dataType()) ? tree(cast.child(), answers) : null;
    return child == null ? null : "[\"cast\"," + child + ",\"" + word + "\"]";
  }

  /** A value of a literal as JSON, or null. */
  private static String value(Object value, DataType type) {
    if (!isKnown(type)) return null;
    if (value == null) return "null";
    if (value instanceof UTF8String) {
      String text = value.toString();
      return UTF8String.fromString(text).equals(value) ? quoted(text) : null;
    }
    if (value instanceof Double) {
      double number = ((Double) value).doubleValue();
      return Double.isNaN(number) || Double.isInfinite(number) ? null : value.toString();
    }
    return value instanceof Integer || value instanceof Long || value instanceof Boolean ? value.toString() : null;
  }

  private static String quoted(String text) {
    StringBuilder found = new StringBuilder("\"");
    for (int i = 0; i < text.length(); i++) {
      char c = text.charAt(i);
      if (c == '"' || c == '\\') found.append('\\').append(c);
      else if (c < ' ') found.append("\\u").append(Integer.toHexString(0x10000 | c).substring(1));
      else found.append(c);
    }
    return found.append('"').toString();
  }
}
