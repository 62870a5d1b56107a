"""How a model was lowered, as facts, as text and as one self-contained HTML page."""
