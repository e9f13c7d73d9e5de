"""Images in: opening files, data sets by name or folder, splits, transforms, mixing and loaders."""
