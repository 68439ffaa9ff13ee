"""Monitoring: quality, drift, consistency and freshness, as mergeable sums."""
