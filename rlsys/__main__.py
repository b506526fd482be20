from rlsys.cli import main

main()
