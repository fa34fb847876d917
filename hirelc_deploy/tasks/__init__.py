"""What a model is for: one module per task, each of which satisfies `tasks.contract.Task`."""
