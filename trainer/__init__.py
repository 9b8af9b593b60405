"""The GPU side: the only package that imports torch. It reads and writes files of a job folder and knows no network."""
