"""Events, attribution, features and examples: the data side, free of any model."""
