"""What is learned: the GLUE tasks from several sources, the embedded data, and tasks with planted ranks."""
