"""DBRX and MPT of Databricks."""
