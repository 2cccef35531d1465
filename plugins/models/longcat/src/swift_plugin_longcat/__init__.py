"""LongCat-Flash of Meituan."""
