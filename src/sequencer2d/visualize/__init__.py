"""Pictures of a model and its training, and the report of a run as one self-contained HTML file."""
