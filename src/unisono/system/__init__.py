"""What an operating system gives: processes, signals, output, memory. *Local.*"""
