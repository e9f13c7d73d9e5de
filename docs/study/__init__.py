"""The page of results: runs as they were summarised, the tables and pictures of `results/study.yaml`, the page."""
