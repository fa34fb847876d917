"""In: scalars of trainings, trials and results. Out: the same in TensorBoard or MLflow."""
