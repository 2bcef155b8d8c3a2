"""The study: whether deep supervision helps, what was measured, and the report on it."""
