"""What foldgroup found, for people: rich renderables. Nothing here prints, and nothing here computes a result."""
