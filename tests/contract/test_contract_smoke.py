def test_x(chain): 
    import subprocess
    print(subprocess.run(["ls","-la",chain],capture_output=True,text=True).stdout)
