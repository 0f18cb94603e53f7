"""The commands gankern and gankern-train: words, files and progress bars."""
