"""``python -P -m spark_llm.demo``: the queries of sql_examples over real tables, and what the engine reused."""
