from tpaw_core.cli import main

main()
